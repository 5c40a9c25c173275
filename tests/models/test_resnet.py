"""Sizes against the published table, and the shapes and dtypes of what comes out."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation.cost import count_macs, count_params
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.layers import Context, Conv
from advmoe_jax.models.moe import MoEConv
from advmoe_jax.models.network import functional
from advmoe_jax.models.resnet import ResNet

ROUTER_MACS = 40_550_528


def network(depth, experts, ratio, *, width=64, router=(16, 3), block_size=16, dtype="float32"):
    """The functional form of a network without arrays: (network, params, stats)."""
    settings = CNN(
        f"resnet{depth}_cifar",
        num_experts=experts,
        ratio=ratio,
        width=width,
        block_size=block_size,
        dtype=dtype,
        router=RouterSettings(width=router[0], blocks=router[1]),
    )
    return functional(
        nnx.eval_shape(lambda: settings.create(in_channels=3, num_classes=10, rngs=nnx.Rngs(0)))
    )


def images(batch, size=32):
    return jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)


def test_a_batch_costs_one_pathway_an_image():
    net, tree, stats = network(18, 4, 0.5, block_size=4)

    def macs(batch):
        return count_macs(lambda p, s, x: net.apply(p, s, x)[0].logits, tree, stats, images(batch))

    # At worst the dispatch pads each of the four experts by three images.
    assert macs(32) <= (32 + 4 * 3) * (ROUTER_MACS + 151_718_400)
    assert macs(32) < 2 * 32 * (ROUTER_MACS + 151_718_400) < 32 * 4 * 151_718_400


@pytest.mark.parametrize(("depth", "params"), [(101, 42_512_970), (152, 58_156_618)])
def test_deep_ones_build(depth, params):
    # As counted for the usual PyTorch CIFAR ResNets.
    assert count_params(network(depth, 1, 1.0)[1]) == params


@pytest.mark.parametrize(
    ("experts", "ratio"), [(1, 0.25), (1, 1.0), (2, 0.5), (2, 1.0), (3, 0.25), (4, 0.6), (5, 1.0)]
)
def test_any_number_of_experts_and_any_ratio(experts, ratio):
    small = {"width": 8, "router": (4, 1)}
    net, tree, stats = network(18, experts, ratio, **small)
    output, after = jax.eval_shape(lambda *a: net.apply(*a, train=True), tree, stats, images(5, 8))
    assert output.logits.shape == (5, 10) and output.logits.dtype == jnp.float32
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    if experts == 1:
        assert output.routing is None
        return
    assert output.routing.scores.shape == (5, 1, experts)
    # Each further expert adds its kernels of all the blocks' convolutions, and nothing else.
    kernels = [s.shape[0] for s in jax.tree.leaves(tree["experts"]) if len(s.shape) == 5]
    assert kernels == [experts] * 16
    of_one = sum(
        np.prod(s.shape[1:]) for s in jax.tree.leaves(tree["experts"]) if len(s.shape) == 5
    )
    one_more = count_params(network(18, experts + 1, ratio, **small)[1]["experts"])
    assert one_more - count_params(tree["experts"]) == of_one


@pytest.mark.parametrize("experts", [1, 2])
def test_logits_are_float32_whatever_the_compute(experts):
    net, tree, stats = network(50, experts, 0.5, width=8, router=(4, 1), dtype="bfloat16")

    def forward(*args):
        return net.apply(*args)[0]

    output = jax.eval_shape(forward, tree, stats, images(2, 8))
    assert output.logits.dtype == jnp.float32
    assert {s.dtype for s in jax.tree.leaves((tree, stats))} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(forward)(tree, stats, images(2, 8)))
    assert "bf16" in text
    if experts > 1:
        assert output.routing.scores.dtype == output.routing.weights.dtype == jnp.float32


def test_what_is_shared_and_what_is_not():
    def build(experts):
        return nnx.eval_shape(
            lambda: ResNet(
                50,
                in_channels=3,
                num_classes=10,
                num_experts=experts,
                ratio=0.5,
                width=8,
                rngs=nnx.Rngs(0),
            )
        )

    moe, dense = build(2), build(1)
    block = moe.layer2_0
    assert type(moe.stem) is type(block.shortcut_conv) is Conv
    assert [type(getattr(block, f"conv{i}")) for i in (1, 2, 3)] == [MoEConv] * 3
    assert moe.stem.kernel.shape[-1] == 8 and dense.stem.kernel.shape[-1] == 4
    assert block.bn1.scale.shape == (8,) and block.bn3.scale.shape == (32,)
    assert [block.conv1.stride, block.conv2.stride, block.conv3.stride] == [1, 2, 1]
    assert not moe.layer2_1.project


def test_an_image_is_classified_alone():
    """In inference mode the logits of an image hang on no other image of the batch."""

    settings = {"in_channels": 1, "num_classes": 3, "num_experts": 1, "ratio": 1.0, "width": 4}
    graph, state = nnx.split(nnx.eval_shape(lambda: ResNet(18, **settings, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: jnp.asarray(rng.uniform(-0.2, 1, s.shape), s.dtype), state)
    for path, value in nnx.to_flat_state(state):
        if path[-1] == "var":
            value[...] = jnp.ones(value.shape)

    @jax.jit
    def run(images):
        return nnx.merge(graph, state)(images, Context())

    batch = jnp.asarray(np.random.default_rng(0).random((3, 9, 8, 1)), jnp.float32)
    logits = run(batch)
    changed = run(batch.at[1].set(0.0))
    assert np.all(np.isfinite(logits)) and logits.shape == (3, 3)
    np.testing.assert_array_equal(np.any(changed != logits, axis=1), [False, True, False])
