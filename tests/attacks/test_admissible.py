"""Every attack refuses images and radii that cannot be meant, before it computes anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax import attacks
from advmoe_jax.attacks import l1, l2, linf, make_threat

IMAGES = np.linspace(0, 1, 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3, 1)
LABELS = np.array([0, 1], np.int32)
BALL, ROUND = linf(0.1), l2(0.5)


def never(images):
    raise AssertionError("the function was called")


UNCALLED = attacks.Routed(never, never, never, never)
ATTACKS = {
    "fgsm": attacks.fgsm(BALL),
    "pgd": attacks.pgd(BALL, num_steps=3, step_size=0.1),
    "pgd without steps": attacks.pgd(BALL, num_steps=0, step_size=0.1),
    "pgd of a randomised function": attacks.eot_pgd(
        BALL, eot_samples=2, num_steps=1, step_size=0.1
    ),
    "tpgd": attacks.tpgd(BALL, step_size=0.1),
    "mi_fgsm": attacks.mi_fgsm(BALL),
    "r_fgsm": attacks.r_fgsm(BALL),
    "ffgsm": attacks.ffgsm(BALL),
    "apgd": attacks.apgd(BALL),
    "apgd, targeted": attacks.apgd(BALL, loss="dlr_targeted", num_targets=1),
    "fab": attacks.fab(BALL),
    "square": attacks.square(BALL),
    "cw": attacks.cw(ROUND),
    "deepfool": attacks.deepfool(ROUND),
    "route_attack": attacks.route_attack(BALL),
    "joint_attack": attacks.joint_attack(BALL),
    "gate_attack": attacks.gate_attack(BALL, "softmax"),
    "worst_pathway": attacks.worst_pathway(BALL),
    "autoattack": attacks.autoattack(BALL),
    "moe_suite": attacks.moe_suite(BALL),
    "pathways": attacks.pathways(BALL),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@every_attack
@pytest.mark.parametrize(
    ("images", "told"),
    [
        (IMAGES * 255, "pixels reach from 0 to 255, outside the range"),
        (IMAGES - 0.5, "pixels reach from -0.5"),
        (np.full_like(IMAGES, np.nan), "pixels reach from nan"),
        ((IMAGES * 255).astype(np.uint8), "images are uint8: convert them to float32"),
    ],
    ids=["0 to 255", "centred", "nan", "uint8"],
)
def test_images_outside_of_the_range(attack, images, told):
    with pytest.raises(ValueError, match=told):
        attack(UNCALLED, images, LABELS, jax.random.key(0))


@pytest.mark.parametrize("epsilon", [1.01, 8, 255.0])
def test_a_ball_wider_than_the_pixel_range(epsilon):
    with pytest.raises(ValueError, match=r"wider than the pixel range \[0, 1\]: give .* 8/255"):
        linf(epsilon)
    with pytest.raises(ValueError, match="wider than the pixel range"):
        make_threat("linf", epsilon)
    assert linf(epsilon, 0, 255).epsilon == epsilon


@pytest.mark.parametrize("threat", [l2(128.0), l1(3000.0), linf(jnp.float32(8))])
def test_a_ball_that_holds_every_image(threat):
    attack = attacks.pgd(threat, num_steps=0, step_size=0.1)
    with pytest.raises(ValueError, match="reaches every image of 9 values in"):
        attack(never, IMAGES, LABELS, jax.random.key(0))


def test_widest_balls_are_let_through():
    for threat in (linf(1.0), l2(3.0), l1(9.0)):
        attack = attacks.pgd(threat, num_steps=0, step_size=0.1, start="none")
        found = attack(lambda x: x.reshape(2, -1), IMAGES, LABELS, jax.random.key(0))
        np.testing.assert_array_equal(found, IMAGES)


@pytest.mark.parametrize("name", ["pgd", "apgd", "square", "route_attack", "autoattack"])
@pytest.mark.parametrize("threat", [linf(np.inf), l2(np.inf), l1(np.inf)])
def test_an_infinite_ball_is_for_attacks_that_look_for_the_nearest_image(name, threat):
    settings = {"pgd": {"num_steps": 0, "step_size": 0.1}}.get(name, {})
    attack = getattr(attacks, name)(threat, **settings)
    with pytest.raises(ValueError, match=r"epsilon=inf in .* reaches every image"):
        attack(UNCALLED, IMAGES, LABELS, jax.random.key(0))


@pytest.mark.parametrize("norm", ["Linf", "l_inf", "l0", ""])
@pytest.mark.parametrize("name", ["fgsm", "apgd", "square", "fab", "joint_attack", "autoattack"])
def test_an_unknown_norm(name, norm):
    attack = getattr(attacks, name)(attacks.Threat(norm, 0.1))
    with pytest.raises(ValueError, match=f"norm '{norm}' is unknown; choose one of linf, l2, l1"):
        attack(UNCALLED, IMAGES, LABELS, jax.random.key(0))


@every_attack
def test_no_images(attack):
    with pytest.raises(ValueError, match="give at least one"):
        attack(UNCALLED, IMAGES[:0], LABELS[:0], jax.random.key(0))


OF_LABELS = [name for name in ATTACKS if name != "tpgd"]


@pytest.mark.parametrize("name", OF_LABELS)
@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (LABELS.astype(np.float32), "labels are float32: give integers"),
        (LABELS[:1], r"labels \(1,\) do not match"),
        (np.int32(0), r"do not match"),
        (None, "labels are None: give an array|do not match"),
    ],
    ids=["floats", "one for all", "a number", "none"],
)
def test_labels_that_are_none(name, labels, told):
    with pytest.raises(ValueError, match=told):
        ATTACKS[name](UNCALLED, IMAGES, labels, jax.random.key(0))


def test_a_list_of_labels_and_labels_that_are_not_looked_at():
    with pytest.raises(ValueError, match="labels are a list: give an array of integers"):
        ATTACKS["pgd"](never, IMAGES, [0, 1], jax.random.key(0))
    ATTACKS["tpgd"](lambda x: x.reshape(2, -1), IMAGES, None, jax.random.key(0))


@pytest.mark.parametrize("name", ["route_attack", "joint_attack", "gate_attack", "worst_pathway"])
def test_an_attack_on_routes_says_what_it_needs(name):
    with pytest.raises(ValueError, match="looks at routes: give it a Routed function"):
        ATTACKS[name](lambda x: x.reshape(2, -1), IMAGES, LABELS, jax.random.key(0))


def test_what_is_not_known_yet_is_not_looked_at():
    attack = attacks.pgd(BALL, num_steps=0, step_size=0.1, start="none")
    compiled = jax.jit(lambda x: attack(lambda x: x.reshape(2, -1), x, LABELS, jax.random.key(0)))
    assert compiled(IMAGES * 2).max() == 2
    with pytest.raises(ValueError, match="images are uint8"):
        compiled(IMAGES.astype(np.uint8))
