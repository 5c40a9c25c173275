"""Packed inference answers as the whole network does."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import dynamic
from advmoe_jax.evaluation.thresholds import by_quotas, exits_taken
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.network import functional
from advmoe_jax.models.trunk import entropy, with_thresholds


def network(experts=1, **router):
    settings = {"num_experts": experts, "ratio": 1 / experts, "width": 8, "block_size": 2}
    cnn = CNN("resnet10_cifar", exits=(1, 2), **settings, router=RouterSettings(**router))
    return functional(cnn.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("experts", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", [21, pytest.param(32, marks=pytest.mark.slow)])
def test_packing_changes_no_prediction(experts, batch):
    net, params, stats = network(experts, width=4, blocks=1)
    images = jax.random.uniform(jax.random.key(0), (batch, 8, 8, 1))
    exits = np.stack(jax.jit(net.apply)(params, stats, images)[0].exits, axis=1)
    entropies = np.asarray(entropy(jnp.asarray(exits[:, :-1])))
    for shares in ([1 / 3] * 3, [0.6, 0.1, 0.3], [0, 0, 1.0]):
        thresholds = by_quotas(entropies, shares)
        taken = exits_taken(entropies, thresholds)
        left = jax.jit(dynamic.classify, static_argnums=(0, 4))(
            net, params, with_thresholds(stats, thresholds), images, 8
        )
        # But for an entropy that is its threshold, which is one image an exit.
        sure = np.abs(entropies - thresholds).min(axis=1) > 1e-6
        np.testing.assert_array_equal(left.exits[sure], taken[sure])
        expected = exits.argmax(-1)[np.arange(batch), left.exits]
        np.testing.assert_array_equal(left.predictions, expected)
        assert np.sum(~sure) <= 2


def test_a_router_of_every_layer_cannot_send_images_away_early():
    with pytest.raises(UserError, match=r"before the first exit: set model.router.scope='global'"):
        network(2, scope="per_layer")
