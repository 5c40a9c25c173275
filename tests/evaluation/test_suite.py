"""The names of attacks: what each stands for, and what is said of a wrong one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from advmoe_jax.attacks import cross_entropy, kl, l2, linf
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.suite import NAMES, named_attack, other_threat, parse_attacks

EPSILON = 0.1


@pytest.fixture
def config():
    return ConfigDict(
        {
            "attack": {"norm": "linf", "epsilon": EPSILON},
            "evaluation": {"step_size": 0.02, "restarts": 2},
        }
    )


def test_clean_comes_first_and_nothing_twice(config):
    for names, expected in {
        "": ["clean"],
        "clean": ["clean"],
        "pgd3,clean": ["clean", "pgd3"],
        " pgd20 , fgsm,,pgd20,": ["clean", "pgd20", "fgsm"],
        "router,router_kl": ["clean", "router", "router_kl"],
    }.items():
        assert [attack.name for attack in parse_attacks(names, config, True)] == expected


def test_a_radius_may_be_an_array(config):
    attack = named_attack("pgd3", config, True, linf(jnp.float32(EPSILON)))
    assert attack.name == "pgd3@linf-0.1" and attack.threat.epsilon == pytest.approx(EPSILON)


def test_settings_stand_beside_the_numbers(config):
    ball = {"norm": "linf", "epsilon": EPSILON}
    steps = {"step_size": 0.02, "restarts": 2}
    expected = {
        "clean": {},
        "fgsm": {**ball, "num_steps": 1, "step_size": EPSILON, "restarts": 1},
        "pgd7": {**ball, "num_steps": 7, **steps},
        "router": {**ball, "num_steps": 20, **steps},
        "router_kl": {**ball, "num_steps": 20, **steps},
    }
    attacks = parse_attacks(",".join(expected), config, True)
    assert {attack.name: attack.settings for attack in attacks} == expected


PACKED = (
    "apgd,apgd-dlr,apgd-t,fab,fab-t,square,autoattack,autoattack_plus,autoattack_rand,moe,route,"
    "joint,straight_through,softmax_gate,frozen_route,worst_pathway"
)


def test_every_name_that_is_listed_makes_an_attack(config):
    listed = [name.split(" ")[0].replace("<steps>", "5") for name in NAMES.split(", ")]
    attacks = {a.name: a for n in listed if n != "cw" for a in parse_attacks(n, config, True)}
    assert len(attacks) == len(listed) - 1 == 28
    for name, attack in attacks.items():
        assert (attack.packed is not None) == (name in PACKED.split(",")) != bool(attack.perturb)
        assert name == "clean" or attack.settings["epsilon"] == EPSILON
    config.attack.norm = "l2"
    assert named_attack("cw30", config, False).settings["num_steps"] == 30


def test_numbers_behind_names(config):
    for name, steps in {
        "mifgsm": 10,
        "mifgsm3": 3,
        "eotpgd7": 7,
        "apgd-t50": 50,
        "moe2": 2,
    }.items():
        assert named_attack(name, config, True).settings["num_steps"] == steps
    assert named_attack("square", config, True).settings["num_queries"] == 5000
    assert named_attack("apgd", config, True).settings["restarts"] == 2
    steps = {"rfgsm": EPSILON / 2, "ffgsm": 1.25 * EPSILON, "mifgsm4": EPSILON / 4, "tpgd": 0.02}
    for name, step in steps.items():
        assert named_attack(name, config, True).settings["step_size"] == pytest.approx(step)


@pytest.mark.parametrize(
    "name", ["pgd", "pgd0", "pgd-1", "pgd1.5", "PGD20", "pgd 20", "fgsm2", "autoatack"]
)
def test_an_unknown_name(config, name):
    with pytest.raises(UserError, match=f"^attack '{name}' is unknown; choose from clean, fgsm"):
        parse_attacks(f"clean,{name}", config, True)


def test_another_threat_model(config):
    assert other_threat("", "", config) is None
    assert other_threat("", "0.1", config) == linf(0.1)
    for text, value in {
        "8/255": 8 / 255,
        "0.031": 0.031,
        ".5": 0.5,
        "1e-2": 0.01,
        "2": 2.0,
    }.items():
        assert other_threat("l2", text, config) == l2(value)
    for text in ("", "abc", "8/0", "1/2/3", "-1", "nan", "inf", "8/"):
        with pytest.raises(UserError) as caught:
            other_threat("l2", text, config)
        assert "\n" not in str(caught.value)
    (clean, same, other) = (
        *parse_attacks("pgd3", config, True, linf(EPSILON)),
        parse_attacks("pgd3", config, True, l2(8 / 255))[1],
    )
    assert (clean.name, same.name, other.name) == ("clean", "pgd3", "pgd3@l2-0.0313725")
    assert other.settings["step_size"] == pytest.approx(0.02 * 8 / 255 / EPSILON)
    assert same.settings["step_size"] == 0.02


@pytest.mark.parametrize("name", ["router", "router_kl", "moe", "route", "autoattack_rand"])
def test_a_dense_network_has_no_router_to_attack(config, name):
    with pytest.raises(UserError, match=f"'{name}' needs a router; the network is dense"):
        parse_attacks(name, config, False)


@pytest.mark.parametrize("name", ["fgsm", "pgd3", "router"])
@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("attack", "epsilon", 0.0, "epsilon=0.0 must be positive"),
        ("attack", "norm", "l3", "norm 'l3' is unknown"),
        ("evaluation", "step_size", -1.0, "step_size=-1.0 must be positive"),
    ],
)
def test_settings_that_cannot_be(config, name, part, field, value, message):
    config[part][field] = value
    if name == "fgsm" and field == "step_size":
        assert named_attack(name, config, True).name == "fgsm"  # whose step is epsilon
        return
    with pytest.raises(UserError, match=f"attack '{name}': {message}"):
        named_attack(name, config, True)


@pytest.fixture(scope="module")
def problem(tiny):
    network, params, stats = tiny(num_experts=3)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(16, 8, 8, 1)), jnp.float32)
    return network, params, stats, images, jnp.asarray(rng.integers(4, size=16))


def perturbed(config, problem, name):
    network, params, stats, images, labels = problem
    keys = jax.random.split(jax.random.key(0), len(labels))
    attack = named_attack(name, config, True)
    run = jax.jit(lambda x, y, k: attack.perturb(network, params, stats, x, y, k))
    return run(images, labels, keys)


def test_clean_leaves_images_as_they_are(config, problem):
    assert np.array_equal(perturbed(config, problem, "clean"), problem[3])


def test_attacks_stay_in_the_ball_and_reach_what_they_aim_at(config, problem):
    network, params, stats, images, labels = problem
    config.evaluation.restarts = 1

    @jax.jit
    def aims(x):
        """The classifier's loss, the router's, and how far the scores are from the clean ones."""
        scores, clean = (network.route(params, stats, y)[0].scores for y in (x, images))
        return jnp.stack(
            [
                jnp.mean(cross_entropy(network.apply(params, stats, x)[0].logits, labels)),
                jnp.mean(cross_entropy(scores, labels % network.num_experts)),
                jnp.mean(kl(scores, clean)),
            ]
        )

    clean = aims(images)
    aimed = {"fgsm": 0, "pgd5": 0, "eotpgd2": 0, "router": 1, "router_kl": 2}
    for name, aim in aimed.items():
        adversarial = perturbed(config, problem, name)
        assert np.abs(adversarial - images).max() <= EPSILON * (1 + 1e-5)
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        assert aims(adversarial)[aim] > clean[aim] + 1e-4, name
