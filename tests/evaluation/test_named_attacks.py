"""The names of attacks: what each stands for, and what is said of a wrong one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import Threat, cross_entropy, kl, l2, linf
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.exit_attacks import MOST_SIDE_EXITS
from advmoe_jax.evaluation.named_attacks import ATTACKS, NAMES, named_attack
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.evaluation.wanted import parse_attacks

EPSILON = 0.1


MIXTURE, DENSE = ("experts", "router"), ("backbone",)
PROTOCOL = Protocol(linf(EPSILON), 0.02, 2)


def test_a_radius_may_be_an_array():
    attack = named_attack("pgd3", PROTOCOL, MIXTURE, linf(jnp.float32(EPSILON)))
    assert attack.name == "pgd3@linf-0.1" and attack.threat.epsilon == pytest.approx(EPSILON)


def test_settings_stand_beside_the_numbers():
    ball = {"norm": "linf", "epsilon": EPSILON}
    steps = {"step_size": 0.02, "restarts": 2}
    expected = {
        "clean": {},
        "fgsm": {**ball, "num_steps": 1, "step_size": EPSILON, "restarts": 1},
        "pgd7": {**ball, "num_steps": 7, **steps},
        "router": {**ball, "num_steps": 20, **steps},
        "router_kl": {**ball, "num_steps": 20, **steps},
    }
    attacks = parse_attacks(",".join(expected), PROTOCOL, MIXTURE)
    assert {attack.name: attack.settings for attack in attacks} == expected


ENSEMBLES = (
    "apgd-ce,apgd-dlr,apgd-t,fab,fab-t,square,autoattack,autoattack_plus,autoattack_rand,moe,route,"
    "joint,straight_through,softmax_gate,frozen_route,worst_pathway,main_apgd,average_apgd,"
    "max_average_apgd,taken,steer,exit_joint,exit_suite,routed_exit_suite,exit1_apgd,"
    "sampled_pathway"
)
EVERY_PART = (*MIXTURE, "exits")


def test_every_name_that_is_listed_makes_an_attack():
    listed = [name.split(" ")[0].replace("<steps>", "5") for name in NAMES.split(", ")]
    # Of the attacks on side exits those on the first one are listed.
    assert len(listed) == 46 and len(ATTACKS) == 46 + 2 * (MOST_SIDE_EXITS - 1)
    attacks = {
        a.name: a for n in listed if n != "cw" for a in parse_attacks(n, PROTOCOL, EVERY_PART)
    }
    assert len(attacks) == len(listed) - 1
    for name, attack in attacks.items():
        assert attack.is_ensemble == (name in ENSEMBLES.split(","))
        assert name == "clean" or attack.settings["epsilon"] == EPSILON
    in_l2 = PROTOCOL._replace(threat=l2(EPSILON))
    assert named_attack("cw30", in_l2, DENSE).settings["num_steps"] == 30


def test_numbers_behind_names():
    for name, steps in {
        "mifgsm": 10,
        "mifgsm3": 3,
        "eotpgd7": 7,
        "apgd-t50": 50,
        "moe2": 2,
    }.items():
        assert named_attack(name, PROTOCOL, MIXTURE).settings["num_steps"] == steps
    for name, (steps, side_exit) in {
        "exit3": (20, 3),
        "exit3_40": (40, 3),
        "exit12_apgd": (100, 12),
        "exit2_apgd50": (None, None),
        "exit2_apgd_50": (50, 2),
        "average40": (40, 0),
        "max_average_apgd30": (30, 0),
    }.items():
        if steps is None:
            with pytest.raises(UserError, match="unknown"):
                named_attack(name, PROTOCOL, EVERY_PART)
            continue
        found = named_attack(name, PROTOCOL, EVERY_PART)
        assert found.settings["num_steps"] == steps and found.record.side_exit == side_exit
    assert named_attack("square", PROTOCOL, MIXTURE).settings["num_queries"] == 5000
    assert named_attack("apgd-ce", PROTOCOL, MIXTURE).settings["restarts"] == 2
    steps = {"rfgsm": EPSILON / 2, "ffgsm": 1.25 * EPSILON, "mifgsm4": EPSILON / 4, "tpgd": 0.02}
    for name, step in steps.items():
        assert named_attack(name, PROTOCOL, MIXTURE).settings["step_size"] == pytest.approx(step)


@pytest.mark.parametrize("name", ["pgd3", "router"])
def test_settings_that_cannot_be(name):
    wrong = PROTOCOL._replace(step_size=-1.0)
    with pytest.raises(UserError, match=f"attack '{name}': step_size=-1.0 must be positive"):
        named_attack(name, wrong, MIXTURE)
    assert named_attack("fgsm", wrong, MIXTURE).name == "fgsm"  # whose step is epsilon
    with pytest.raises(
        UserError, match=r"attack 'deepfool': .*; --norm and --epsilon give another"
    ):
        named_attack("deepfool", PROTOCOL._replace(threat=Threat("l1", 1.0)), MIXTURE)


@pytest.fixture(scope="module")
def problem(tiny):
    network, params, stats = tiny(num_experts=3)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(16, 8, 8, 1)), jnp.float32)
    return network, params, stats, images, jnp.asarray(rng.integers(4, size=16))


def perturbed(problem, name, restarts=2):
    network, params, stats, images, labels = problem
    keys = jax.random.split(jax.random.key(0), len(labels))
    attack = named_attack(name, PROTOCOL._replace(restarts=restarts), MIXTURE)
    run = jax.jit(lambda x, y, k: attack.perturb(network, params, stats, x, y, k))
    return run(images, labels, keys)


def test_clean_leaves_images_as_they_are(problem):
    assert np.array_equal(perturbed(problem, "clean"), problem[3])


@pytest.mark.slow
def test_attacks_stay_in_the_ball_and_reach_what_they_aim_at(problem):
    network, params, stats, images, labels = problem

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
        adversarial = perturbed(problem, name, restarts=1)
        assert np.abs(adversarial - images).max() <= EPSILON * (1 + 1e-5)
        assert adversarial.min() >= 0 and adversarial.max() <= 1
        assert aims(adversarial)[aim] > clean[aim] + 1e-4, name


@pytest.mark.parametrize(
    ("name", "warned"),
    [("pgd9", True), ("pgd10", False), ("pgd20", False), ("fgsm", False), ("rfgsm", False),
     ("mifgsm3", False), ("clean", False), ("apgd-ce5", False)],
)  # fmt: skip
def test_an_attack_too_short_to_reach_the_balls_edge_says_so(name, warned):
    protocol = Protocol(linf(0.2), step_size=0.02)
    warnings = named_attack(name, protocol, DENSE).warnings
    assert [w.endswith("looks more robust than it is") for w in warnings] == [True] * warned
