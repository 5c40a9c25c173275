"""Bounds of a router's scores, against every corner of a box and against many images of it."""

import itertools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models import CNN, LinearRouter, Router, RouterSettings, are_certified, functional
from advmoe_jax.models.layers import Context
from advmoe_jax.models.route_bounds import score_margins

RNG = np.random.default_rng(0)


def corners(low, high):
    """Every corner of one image's box, [2^pixels, H, W, 1]."""
    choices = itertools.product(*zip(low.ravel(), high.ravel(), strict=True))
    return np.array(list(choices), np.float32).reshape(-1, *low.shape)


def randomised(module):
    """The module with parameters and statistics that are nowhere 0 or 1."""
    graph, state = nnx.split(module)

    def drawn(path, x):
        low = 0.5 if "var" in str(path) else -1.0
        return jnp.asarray(RNG.uniform(low, 1.0, x.shape), x.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(drawn, state))


@pytest.mark.parametrize("resolution", [3, 2])
def test_a_linear_routers_bounds_are_exact(resolution):
    """Exhaustive: a linear function is least at a corner of the box."""
    router = randomised(LinearRouter(1, 3, resolution=resolution, rngs=nnx.Rngs(0)))
    low = RNG.uniform(-1, 0, (4, 3, 3, 1)).astype(np.float32)
    high = low + RNG.uniform(0, 1, low.shape).astype(np.float32)
    found = np.asarray(score_margins(router, low, high))
    for image, margins in enumerate(found):
        scores = np.asarray(router(corners(low[image], high[image]), Context()))
        apart = scores[:, :, None] - scores[:, None, :]
        np.testing.assert_allclose(margins, apart.min(axis=0), atol=1e-5)


def test_the_certificate_is_what_exhaustive_search_finds():
    router = randomised(LinearRouter(1, 2, resolution=3, rngs=nnx.Rngs(0)))
    images = RNG.uniform(-1, 1, (40, 3, 3, 1)).astype(np.float32)
    low, high = images - 0.15, images + 0.15
    chosen = np.argmax(router(images, Context()), axis=-1)
    certain = np.asarray(are_certified(score_margins(router, low, high), chosen[:, None]))
    searched = [
        (np.argmax(router(corners(*box), Context()), axis=-1) == expert).all()
        for box, expert in zip(zip(low, high, strict=True), chosen, strict=True)
    ]
    np.testing.assert_array_equal(certain, searched)
    assert 0 < certain.sum() < len(certain)


@pytest.mark.parametrize("resolution", [0, 4])
def test_a_deep_routers_bounds_hold_and_close_on_a_point(resolution):
    router = randomised(Router(1, 3, resolution=resolution, width=4, blocks=1, rngs=nnx.Rngs(0)))
    low = RNG.uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    high = low + 0.02
    margins = np.asarray(jax.jit(lambda a, b: score_margins(router, a, b))(low, high))
    inside = RNG.choice([0.0, 1.0, 0.4], (500, *low.shape))
    run = jax.jit(lambda x: router(x, Context()))
    for weights in inside:
        scores = np.asarray(run(jnp.asarray(low + weights * (high - low), jnp.float32)))
        apart = scores[:, :, None] - scores[:, None, :]
        assert (apart >= margins - 1e-3 * np.abs(margins).max()).all()
    scores = np.asarray(run(low))
    exact = scores[:, :, None] - scores[:, None, :]
    np.testing.assert_allclose(score_margins(router, low, low), exact, rtol=1e-3, atol=1e-3)


def test_of_several_experts_the_set_counts():
    margins = np.zeros((2, 3, 3))
    margins[:, 0, 2] = margins[:, 1, 2] = [1.0, -1.0]  # neither 0 nor 1 is sure to beat the other
    chosen = np.array([[1, 0], [1, 0]])
    np.testing.assert_array_equal(are_certified(margins, chosen), [True, False])
    np.testing.assert_array_equal(are_certified(margins, chosen[:, :1]), [False, False])


def test_routers_of_layers_see_no_images():
    router = RouterSettings("per_layer", width=4)
    model = CNN("resnet10_cifar", num_experts=2, ratio=0.5, width=8, router=router)
    made = model.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))
    network, params, stats = functional(made)
    with pytest.raises(UserError, match=r"sees the image.* set model\.router\.scope"):
        network.route_margins(params, stats, jnp.zeros((1, 8, 8, 1)), jnp.ones((1, 8, 8, 1)))
