"""The network that scores the experts of an image."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation.cost import count_macs, count_params
from advmoe_jax.models.layers import Context
from advmoe_jax.models.router import Router


def test_published_size():
    model = nnx.eval_shape(lambda: Router(3, 2, width=16, blocks=3, rngs=nnx.Rngs(0)))
    assert count_params(nnx.state(model, nnx.Param)) == 269_202

    def scores(state, images):
        return nnx.merge(nnx.graphdef(model), state)(images, Context())

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert count_macs(scores, nnx.state(model), images) == 40_550_528


@pytest.mark.parametrize(("channels", "experts", "shape"), [(1, 2, (8, 8)), (3, 5, (9, 7))])
def test_scores_of_any_images(channels, experts, shape):
    def run(images):
        return Router(channels, experts, width=4, blocks=1, rngs=nnx.Rngs(0))(images, Context())

    images = jax.ShapeDtypeStruct((2, *shape, channels), jnp.bfloat16)
    scores = jax.eval_shape(run, images)
    assert scores.shape == (2, experts) and scores.dtype == jnp.float32


def test_scores_depend_on_the_image_alone():
    model = nnx.eval_shape(lambda: Router(1, 3, width=4, blocks=1, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 1, s.shape), s.dtype), state)

    @jax.jit
    def run(images):
        return nnx.merge(graph, state)(images, Context())

    images = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32)
    scores = run(images)
    assert np.ptp(scores, axis=0).min() > 0
    changed = run(images.at[2].set(0.0))
    np.testing.assert_array_equal(np.any(changed != scores, axis=1), [False, False, True, False])
