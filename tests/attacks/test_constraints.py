"""The ball and the pixel range; starts and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe_jax.attacks.constraints import (
    gaussian_start,
    l2,
    linf,
    make_threat,
    project,
    steepest,
    uniform_start,
)

BALLS = {"linf": linf, "l2": l2}


def norms(norm, delta):
    delta = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.abs(delta).max(axis=1) if norm == "linf" else np.sqrt((delta**2).sum(axis=1))


def assert_inside(norm, epsilon, clean, images, lower=0.0, upper=1.0):
    clean = np.asarray(clean, np.float64)
    assert images.shape == clean.shape
    assert np.all(np.isfinite(images))
    assert images.min() >= np.float32(lower) and images.max() <= np.float32(upper)
    tolerance = (1e-6 if norm == "linf" else 1e-5) * (upper - lower)
    assert norms(norm, np.asarray(images, np.float64) - clean).max() <= epsilon + tolerance


def random_images(batch, shape=(4, 4, 1), seed=0):
    """Uniform pixels, some of them at the ends of the range."""
    pixels = np.random.default_rng(seed).uniform(-0.2, 1.2, (batch, *shape))
    return jnp.asarray(pixels.clip(0, 1), jnp.float32)


@settings(deadline=None, max_examples=25)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.one_of(st.sampled_from([1e-8, 8 / 255, 1.5, 100.0]), st.floats(1e-6, 3)),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_projection(norm, epsilon, scale, seed):
    clean = random_images(3, seed=seed)
    noise = np.random.default_rng(seed).normal(size=clean.shape)
    threat = BALLS[norm](jnp.float32(epsilon))
    moved = clean + jnp.asarray(scale * noise, jnp.float32)
    result = project(threat, moved, clean)
    assert_inside(norm, epsilon, clean, result)
    # A point that is inside already stays where it is.
    np.testing.assert_allclose(project(threat, result, clean), result, atol=1e-6)


def test_projection_is_the_nearest_point_of_the_ball():
    clean = jnp.full((1, 2, 1, 1), 0.5)
    moved = clean + jnp.array([0.3, 0.4]).reshape(clean.shape)
    np.testing.assert_allclose(
        project(l2(0.25), moved, clean).ravel(), [0.5 + 0.15, 0.5 + 0.2], rtol=1e-6
    )
    np.testing.assert_allclose(
        project(linf(0.35), moved, clean).ravel(), [0.5 + 0.3, 0.5 + 0.35], rtol=1e-6
    )


def test_large_images_stay_in_the_l2_ball():
    clean = random_images(2, (64, 64, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    assert_inside("l2", 0.5, clean, uniform_start(l2(0.5), clean, keys))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_steepest_step_has_unit_norm_however_small_the_gradient(norm, scale):
    gradient = jnp.asarray(scale * np.random.default_rng(0).normal(size=(3, 4, 4, 1)), jnp.float32)
    direction = steepest(BALLS[norm](1.0), gradient)
    np.testing.assert_allclose(norms(norm, direction), 1, rtol=1e-6)
    # No direction of unit norm rises faster.
    unit = np.asarray(gradient, np.float64) / scale
    dual = np.abs(unit).sum((1, 2, 3)) if norm == "linf" else norms("l2", unit)
    np.testing.assert_allclose(np.sum(unit * direction, (1, 2, 3)), dual, rtol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_step_where_it_is_flat(norm):
    assert not np.any(steepest(BALLS[norm](1.0), jnp.zeros((2, 3, 3, 1))))


def test_uniform_start_in_linf():
    clean = jnp.full((64, 8, 8, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 64)
    delta = (uniform_start(linf(0.1), clean, keys) - clean) / 0.1
    assert np.abs(delta).max() <= 1 + 1e-5
    np.testing.assert_allclose(np.mean(delta), 0, atol=0.03)
    np.testing.assert_allclose(np.var(delta), 1 / 3, rtol=0.05)
    np.testing.assert_allclose(np.mean(np.abs(delta) > 0.9), 0.1, atol=0.02)


def test_uniform_start_in_l2():
    clean = jnp.full((512, 2, 2, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 512)
    delta = uniform_start(l2(0.2), clean, keys) - clean
    # Of points uniform in a ball of dimension d, radius^d is uniform.
    volume = (norms("l2", delta) / 0.2) ** 4
    assert volume.max() <= 1 + 1e-4
    deciles = np.histogram(volume, 4, (0, 1.001))[0] / 512
    np.testing.assert_allclose(deciles, 0.25, atol=0.06)
    np.testing.assert_allclose(np.mean(delta, axis=0), 0, atol=0.02)


def test_gaussian_start():
    clean = jnp.full((64, 8, 8, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 64)
    delta = gaussian_start(linf(0.1), clean, keys, 0.001) - clean
    np.testing.assert_allclose(np.mean(delta), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(delta), 0.001, rtol=0.05)
    assert 0.003 < np.abs(delta).max() < 0.006
    clipped = gaussian_start(linf(0.001), clean, keys, 1.0)
    assert_inside("linf", 0.001, clean, clipped)


@pytest.mark.parametrize("start", [uniform_start, lambda *a: gaussian_start(*a, 0.01)])
def test_images_start_apart_and_each_from_its_own_key(start):
    clean = jnp.full((4, 3, 3, 1), 0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    begun = start(linf(0.1), clean, keys)
    assert len(np.unique(begun)) == begun.size
    np.testing.assert_array_equal(start(linf(0.1), clean[1:3], keys[1:3]), begun[1:3])


@pytest.mark.parametrize("epsilon", [0, -1, 0.0, float("nan")])
@pytest.mark.parametrize("threat", [linf, l2, lambda e: make_threat("linf", e)])
def test_epsilon_must_be_positive(threat, epsilon):
    with pytest.raises(ValueError, match=r"epsilon=.* must be positive"):
        threat(epsilon)


@pytest.mark.parametrize("threat", [linf, l2])
def test_range_must_not_be_empty(threat):
    with pytest.raises(ValueError, match=r"\[1.0, 1.0\] is empty"):
        threat(0.1, 1.0, 1.0)


def test_threat_by_name():
    assert make_threat("linf", 0.1) == linf(0.1) and make_threat("l2", 0.5) == l2(0.5)
    assert linf(0.1)[2:] == (0.0, 1.0)
    with pytest.raises(ValueError, match="'l0' is unknown; choose one of linf, l2, l1"):
        make_threat("l0", 0.1)
