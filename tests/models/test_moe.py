"""MoEConv against running every expert densely and picking per image."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models.layers import Context, Conv, conv2d
from advmoe_jax.models.moe import MoEConv, conv_factory
from advmoe_jax.routing import dispatch

EXPERTS, BLOCK = 3, 2
ROUTES = {
    "top-1": [[0], [2], [1], [2], [0]],
    "all to one": [[1]] * 5,
    "top-2": [[0, 2], [2, 1], [1, 0], [2, 0], [0, 1]],
    "top-N": [[0, 2, 1], [2, 1, 0], [1, 0, 2], [2, 0, 1], [0, 1, 2]],
}


@pytest.fixture(scope="module")
def layer():
    return MoEConv(2, 4, 3, 2, 1, num_experts=EXPERTS, rngs=nnx.Rngs(0))


def run(layer, indices, is_sorted, x, kernel, weights):
    """The layer's images out, with the kernel given."""
    graph, params = nnx.split(layer)
    params["kernel"] = params["kernel"].replace(kernel)
    plan = dispatch.plan(indices, EXPERTS, BLOCK)
    context = Context(plan=plan, weights=weights, is_sorted=is_sorted)
    model = nnx.merge(graph, params, copy=True)
    if not is_sorted:
        return model(x, context)
    return model(dispatch.gather(x, plan), context)[plan.position[:, 0]]


def densely(indices, x, kernel, weights):
    every = jnp.stack([conv2d(x, k, stride=2, padding=1) for k in kernel])
    chosen = every[indices, jnp.arange(len(x))[:, None]]
    return jnp.sum(chosen * weights[..., None, None, None], axis=1)


@pytest.mark.parametrize(
    ("route", "is_sorted"),
    [("top-1", True), ("top-1", False), ("all to one", True), ("top-2", False), ("top-N", False)],
)
def test_equals_running_every_expert(layer, route, is_sorted):
    indices = jnp.array(ROUTES[route])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 6, 6, 2)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.2, 1, indices.shape), jnp.float32)
    probe = jnp.asarray(rng.normal(size=(5, 3, 3, 4)), jnp.float32)

    def evaluate(function):
        def loss(*args):
            out = function(*args)
            return jnp.sum(out * probe), out

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(grad)(x, layer.kernel[...], weights)

    (_, out), grads = evaluate(partial(run, layer, indices, is_sorted))
    (_, ref), ref_grads = evaluate(partial(densely, indices))
    np.testing.assert_allclose(out, ref, rtol=1e-6, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), grads, ref_grads)
    assert np.all(np.abs(grads[2]) > 1e-3)  # the gate's gradient arrives


def test_every_expert_starts_he_normal_and_on_its_own():
    kernel = jax.jit(lambda: MoEConv(32, 64, 3, num_experts=3, rngs=nnx.Rngs(0)).kernel[...])()
    kernel = np.asarray(kernel)
    assert kernel.shape == (3, 3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std((1, 2, 3, 4)), np.sqrt(2 / (3 * 3 * 64)), rtol=0.03)
    correlation = np.corrcoef(kernel.reshape(3, -1))
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.03


def test_compute_dtype():
    layer = MoEConv(2, 4, 3, num_experts=3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.kernel[...].dtype == jnp.float32
    out = jax.eval_shape(
        partial(run, layer, jnp.array(ROUTES["top-1"]), True),
        jnp.ones((5, 6, 6, 2)),
        layer.kernel[...],
        jnp.ones((5, 1)),
    )
    assert out.dtype == jnp.bfloat16


def test_one_expert_is_a_plain_convolution():
    assert conv_factory(1) is Conv
    two = nnx.eval_shape(lambda: conv_factory(2)(2, 4, 3, rngs=nnx.Rngs(0)))
    assert isinstance(two, MoEConv) and two.kernel.shape == (2, 3, 3, 2, 4)
