"""FAB: near the smallest perturbation, and in the ball or nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import deepfool, fab, l1, l2, linf
from advmoe_jax.attacks.constraints import distance
from advmoe_jax.attacks.fab import fab_steps
from advmoe_jax.attacks.stepwise import Batch

FAR = {"linf": linf(np.inf), "l2": l2(np.inf), "l1": l1(np.inf)}
BALLS = {"linf": linf(0.1), "l2": l2(0.5), "l1": l1(0.7)}
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)


def linear(images):
    return images.reshape(len(images), -1) @ MATRIX


@pytest.mark.parametrize("norm", FAR)
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_map_the_boundary_is_found_exactly(norm, targeted):
    images = jnp.asarray(np.random.default_rng(1).uniform(0.3, 0.7, (20, 4, 4, 1)), jnp.float32)
    logits = linear(images)
    labels = jnp.argmax(logits, axis=1)
    attack = fab(FAR[norm], num_steps=30, targeted=targeted, num_targets=3)
    result = jax.jit(partial(attack, linear))(images, labels, jax.random.key(0))
    assert np.all(np.argmax(linear(result), axis=1) != labels)
    # Without the pixel range: the margin over the dual norm of the difference of two columns.
    order = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    nearest = []
    for x, y in zip(np.asarray(logits), np.asarray(labels), strict=True):
        others = [c for c in range(4) if c != y]
        nearest.append(
            min((x[y] - x[c]) / np.linalg.norm(MATRIX[:, c] - MATRIX[:, y], order) for c in others)
        )
    far = np.asarray(distance(FAR[norm], result, images))
    inside = np.array(nearest) < {"linf": 0.25, "l2": 0.25, "l1": 0.25}[norm]
    assert inside.sum() > 5
    np.testing.assert_allclose(far[inside], np.array(nearest)[inside], rtol=0.06)
    assert np.all(far >= np.array(nearest) * 0.999)


@pytest.mark.parametrize(
    "norm", ["linf", *(pytest.param(n, marks=pytest.mark.slow) for n in ("l2", "l1"))]
)
@pytest.mark.parametrize("targeted", [False, True])
def test_in_the_ball_or_the_clean_image(networks, assert_valid, norm, targeted):
    network, threat = networks["robust"], BALLS[norm]
    images, labels = network.images[:100], network.labels[:100]
    attack = fab(threat, num_steps=20, targeted=targeted, num_targets=3)
    result = jax.jit(partial(attack, network.function))(images, labels, jax.random.key(0))
    assert_valid(threat, result, images)
    fooled = np.argmax(network.function(result), axis=1) != labels
    clean = np.all(result == images, axis=(1, 2, 3))
    assert np.all(fooled | clean) and 5 < np.sum(fooled & ~clean) < 95


@pytest.mark.slow
def test_restarts_begin_elsewhere_and_never_hurt(networks):
    network = networks["robust"]
    images, labels = network.images[:100], network.labels[:100]

    def distances(restarts):
        attack = fab(linf(0.15), num_steps=5, restarts=restarts)
        result = jax.jit(partial(attack, network.function))(images, labels, jax.random.key(0))
        return np.asarray(distance(linf(1), result, images))

    once, thrice = distances(1), distances(3)
    found = once > 0
    assert np.all(thrice[found] > 0) and np.all(thrice[found] <= once[found] + 1e-6)
    keys, zeros = jax.random.split(jax.random.key(0), 100), jnp.zeros(100, jnp.int32)
    steps = fab_steps(linf(0.15), restarts=2)
    starts = [steps.begin(Batch(images, labels, labels, zeros + i, keys)).images for i in (0, 1)]
    np.testing.assert_array_equal(starts[0], images)
    far = distance(linf(1), starts[1], images)
    assert np.all((far > 0.05) & (far <= 0.15 / 2 + 1e-6))


@pytest.mark.slow
def test_other_pixel_ranges(networks, assert_valid):
    network = networks["standard"]
    images, labels = network.images[:50], network.labels[:50]
    run = jax.jit(partial(fab(linf(0.1), num_steps=10), network.function))
    plain = run(images, labels, jax.random.key(0))
    wide = linf(25.5, -100.0, 155.0)
    scaled = jax.jit(partial(fab(wide, num_steps=10), lambda x: network.function((x + 100) / 255)))(
        images * 255 - 100, labels, jax.random.key(0)
    )
    assert_valid(wide, scaled, images * 255 - 100)
    assert abs(network.accuracy(plain) - network.accuracy((scaled + 100) / 255)) <= 0.02


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"eta": 0.9}, "eta=0.9 at least 1"),
        ({"alpha_max": 1.5}, "alpha_max=1.5"),
        ({"restarts": 0}, "restarts=0"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        fab(linf(0.1), **settings)


def test_too_many_targets():
    images = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="num_targets=9, but 4 classes leave 3 wrong ones"):
        fab(linf(0.1), targeted=True)(linear, images, jnp.zeros(2, int), jax.random.key(0))


@pytest.mark.parametrize("norm", BALLS)
def test_restarts_begin_in_the_ball_of_half_the_radius(norm):
    images = jnp.full((64, 4, 4, 1), 0.5)
    threat = BALLS[norm]._replace(epsilon={"linf": 0.4, "l2": 1.6, "l1": 6.0}[norm])
    labels, keys = jnp.zeros(64, jnp.int32), jax.random.split(jax.random.key(0), 64)
    steps = fab_steps(threat, restarts=2)
    first, second = (
        steps.begin(Batch(images, labels, labels, jnp.full_like(labels, i), keys)) for i in (0, 1)
    )
    np.testing.assert_array_equal(first.images, images)
    far = np.asarray(distance(threat, second.images, images))
    assert 0.8 * threat.epsilon / 2 < far.max() <= threat.epsilon / 2 * (1 + 1e-5)


@pytest.mark.parametrize("attack", ["fab", "fab-t", "deepfool"])
def test_classes_that_cannot_be_change_nothing(attack):
    """Their logits are -inf, as those of classes that are masked."""
    images = jnp.asarray(np.random.default_rng(1).uniform(0.3, 0.7, (20, 4, 4, 1)), jnp.float32)
    labels = jnp.argmax(linear(images), axis=1)
    make = {
        "fab": fab(BALLS["linf"], num_steps=10),
        "fab-t": fab(BALLS["linf"], num_steps=10, targeted=True, num_targets=3),
        "deepfool": deepfool(BALLS["linf"]),
    }[attack]

    def masked(x):
        return jnp.concatenate([linear(x), jnp.full((len(x), 2), -jnp.inf)], axis=1)

    one, other = (make(f, images, labels, jax.random.key(0)) for f in (linear, masked))
    assert np.mean(np.any(one != images, axis=(1, 2, 3))) > 0.5
    np.testing.assert_allclose(other, one, atol=1e-6)


def test_no_step_is_taken_towards_a_class_that_cannot_be():
    images = jnp.asarray(np.random.default_rng(1).uniform(0.3, 0.7, (20, 4, 4, 1)), jnp.float32)
    labels = jnp.argmax(linear(images), axis=1)

    def masked(x):
        return jnp.concatenate([linear(x), jnp.full((len(x), 2), -jnp.inf)], axis=1)

    attack = fab(BALLS["linf"], num_steps=10, targeted=True, num_targets=5)
    less = fab(BALLS["linf"], num_steps=10, targeted=True, num_targets=3)
    found = attack(masked, images, labels, jax.random.key(0))
    assert np.all(np.isfinite(found))
    expected = less(masked, images, labels, jax.random.key(0))
    np.testing.assert_allclose(found, expected, atol=1e-6)
