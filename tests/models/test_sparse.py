"""Sparse networks read the channels with the best scores, and learn the scores straight through."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation.cost import keep_for, network_cost
from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.layers import Context, Conv, conv2d
from advmoe_jax.models.network import functional
from advmoe_jax.models.sparse import channel_mask, kept_channels, scores_of

SCORES = jnp.array([0.2, -1.0, 3.0, 0.1, 0.5])


def pruned_conv():
    conv = Conv(5, 4, 3, 1, 1, rngs=nnx.Rngs(0))
    conv.prune(0.4)
    conv.scores[...] = SCORES
    return conv


def test_the_best_channels_are_kept():
    assert kept_channels(SCORES, 3).tolist() == [0, 2, 4]
    np.testing.assert_allclose(channel_mask(SCORES, 3), [1, 0, 1, 0, 1], atol=1e-6)


def test_a_convolution_reads_the_channels_kept_alone():
    conv = pruned_conv()
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    kept = jnp.array([2, 4])
    expected = conv2d(x[..., kept], conv.kernel[...][:, :, kept], 1, 1)
    np.testing.assert_array_equal(conv(x, Context()), expected)
    np.testing.assert_allclose(conv(x, Context(surrogate=True)), expected, atol=1e-6)
    disturbed = x.at[..., jnp.array([0, 1, 3])].set(7.0)
    np.testing.assert_array_equal(conv(disturbed, Context()), expected)


def test_scores_get_the_gradient_of_the_mask():
    conv = pruned_conv()
    graph, state = nnx.split(conv)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 5))
    target = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))

    def loss(scores, surrogate):
        state["scores"] = state["scores"].replace(scores)
        return jnp.sum(nnx.merge(graph, state)(x, Context(surrogate=surrogate)) * target)

    by_channel = [
        jnp.sum(conv2d(x[..., [c]], conv.kernel[...][:, :, [c]], 1, 1) * target) for c in range(5)
    ]
    np.testing.assert_allclose(jax.grad(loss)(SCORES, True), by_channel, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(jax.grad(loss)(SCORES, False), np.zeros(5))


def network(name="vgg11_bn", keep=0.3):
    network = CNN(name, width=8, keep=keep)
    return functional(network.create(in_channels=3, num_classes=5, rngs=nnx.Rngs(0)))


def test_scores_are_a_part_of_their_own():
    net, params, stats = network()
    assert set(net.parts) == {"backbone", "scores"} and not net.is_moe
    leaves = jax.tree_util.tree_leaves_with_path(params["scores"])
    assert {path[-1].key for path, _ in leaves} == {"scores"}
    assert len(leaves) == 7  # all convolutions but the first
    assert "conv1_0" not in params["scores"]
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    output, after = net.apply(params, stats, images)
    assert output.routing is None and output.logits.shape == (2, 5)
    assert jax.tree.structure(after) == jax.tree.structure(stats)


def test_choosing_by_scores_is_seen_in_the_logits():
    net, params, stats = network("resnet10_cifar")
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
    apply = jax.jit(net.apply, static_argnames="surrogate")
    logits = apply(params, stats, images)[0].logits
    masked = apply(params, stats, images, surrogate=True)[0].logits
    np.testing.assert_allclose(logits, masked, rtol=1e-3, atol=1e-5)
    other = params | {"scores": jax.tree.map(lambda s: jnp.arange(s.size) * 1.0, params["scores"])}
    assert np.abs(apply(other, stats, images)[0].logits - logits).max() > 1e-3


def test_scores_start_from_the_norms_of_the_kernels():
    kernel = jnp.zeros((1, 2, 3, 1)).at[0, :, 0, 0].set(jnp.array([3.0, 4.0]))
    kernel = kernel.at[0, 0, 2, 0].set(-10.0)
    tree = {"block": {"conv": {"kernel": kernel, "other": jnp.ones(2)}}}
    scores = scores_of(tree, {"block": {"conv": {"scores": jnp.ones(3)}}})
    np.testing.assert_allclose(scores["block"]["conv"]["scores"], [0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    "name",
    [
        "resnet18_cifar",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vgg11_bn", "densenet_cifar")),
    ],
)
def test_pruned_to_a_cost(name):
    dense = CNN(name)
    sparse = dense._replace(keep=keep_for(dense, (32, 32, 3), 10, 0.35))
    cost = network_cost(sparse, (32, 32, 3), 10)
    # At most the target, and no further from it than one step of rounding in every layer.
    assert 0.33 <= cost["macs"]["total"] / cost["macs"]["dense"] <= 0.35
    assert cost["params"]["pathway"] < 0.5 * cost["params"]["backbone"]
