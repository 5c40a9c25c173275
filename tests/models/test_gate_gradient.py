"""What an attacker differentiates: the network as it is, not the router's training surrogate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.routing.choice import Routing


@pytest.fixture(scope="module")
def setting(tiny):
    network, params, stats = tiny(num_experts=3)
    images = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1))
    return network, params, stats, images


def test_in_inference_mode_the_gradient_is_that_of_the_route_taken(setting):
    network, params, stats, images = setting
    indices = network.route(params, stats, images)[0].indices
    fixed = Routing(indices, jnp.ones(indices.shape), jnp.zeros((8, 1, 3)))  # mere constants

    def image_gradient(routing):
        def loss(x):
            return jnp.sum(network.apply(params, stats, x, routing=routing)[0].logits[:, 0])

        return jax.jit(jax.grad(loss))(images)

    np.testing.assert_array_equal(image_gradient(None), image_gradient(fixed))
    assert jnp.abs(image_gradient(None)).max() > 1e-4


def test_the_surrogate_is_there_for_who_asks_for_it(setting):
    network, params, stats, images = setting

    def image_gradient(surrogate):
        def loss(x):
            output = network.apply(params, stats, x, surrogate=surrogate)[0]
            return jnp.sum(output.logits[:, 0])

        return jax.jit(jax.grad(loss))(images)

    assert jnp.abs(image_gradient(True) - image_gradient(False)).max() > 1e-4


def test_training_mode_trains_the_router_through_the_gate(setting):
    network, params, stats, images = setting

    def router_gradient(train):
        def loss(router):
            logits = network.apply(params | {"router": router}, stats, images, train=train)[0]
            return jnp.sum(logits.logits[:, 0])

        gradient = jax.jit(jax.grad(loss))(params["router"])
        return max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))

    assert router_gradient(train=True) > 1e-4
    assert router_gradient(train=False) == 0
