"""Sizes and shapes of WideResNet, VGG, DenseNet and the ImageNet ResNets."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation.cost import count_params
from advmoe_jax.models import vgg
from advmoe_jax.models.cnn import BACKBONES, CNN, RouterSettings, class_of
from advmoe_jax.models.layers import Context
from advmoe_jax.models.network import functional
from advmoe_jax.models.wide_resnet import PreActivationBlock, WideResNet
from advmoe_jax.routing.choice import choose


def config(name, experts, ratio, width=0, **router):
    settings = {"num_experts": experts, "ratio": ratio, "width": width, "block_size": 4}
    return CNN(name, **settings, router=RouterSettings(**router))


def shapes(settings, classes):
    """(network, params, stats) without arrays."""

    def create():
        return settings.create(in_channels=3, num_classes=classes, rngs=nnx.Rngs(0))

    return functional(nnx.eval_shape(create))


# The deepest ResNets differ from ResNet-50 by a number, and take long to trace.
@pytest.mark.parametrize("name", sorted(n for n in BACKBONES if not n.startswith("resnet1")))
def test_every_name_builds_and_classifies(name):
    settings = config(name, 3, 0.5, blocks=1)
    if getattr(class_of(name), "is_dense_alone", False):
        settings = settings._replace(num_experts=1, ratio=1.0)
    net, params, stats = shapes(settings, 7)
    size = 28 if name == "small_cnn" else 64
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)

    def logits(p, s, x):
        return net.apply(p, s, x)[0].logits

    output = jax.eval_shape(logits, params, stats, images)
    assert (output.shape, output.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize(
    "name",
    [
        "vgg11_bn",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("wrn_28_4_cifar", "densenet_cifar")
        ),
    ],
)
def test_a_routed_image_gets_its_pathway_alone(name):
    settings = config(name, 2, 0.5, width=4, blocks=1)
    model = settings.create(in_channels=3, num_classes=5, rngs=nnx.Rngs(0))
    net, params, stats = functional(model)
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    apply = jax.jit(net.apply)
    routing = choose(jax.random.normal(jax.random.key(1), (6, 1, 2)))
    mixed = apply(params, stats, images, routing=routing)[0].logits
    alone = [
        apply(params, stats, images, routing=routing._replace(indices=jnp.full((6, 1, 1), e)))[0]
        for e in range(2)
    ]
    expected = np.stack([a.logits for a in alone])[routing.indices[:, 0, 0], np.arange(6)]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    assert np.abs(alone[0].logits - alone[1].logits).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10_cifar", "vgg11_bn"])
def test_remat_changes_nothing_but_what_is_kept(name):
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    routing = choose(jax.random.normal(jax.random.key(1), (6, 1, 2)))

    def evaluate(remat):
        settings = config(name, 2, 0.5, width=4, blocks=1)._replace(remat=remat)
        model = settings.create(in_channels=3, num_classes=5, rngs=nnx.Rngs(0))
        net, params, stats = functional(model)

        def loss(params):
            output, after = net.apply(params, stats, images, train=True, routing=routing)
            return jnp.sum(output.logits[:, 0] ** 3), after

        gradient = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(gradient)(params), "remat" in str(jax.make_jaxpr(gradient)(params))

    (kept, has_remat), (again, has_again) = evaluate(False), evaluate(True)
    assert not has_remat and has_again
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), again, kept)


def block(raw_widening, channels):
    return PreActivationBlock(
        4, channels, 1, raw_widening=raw_widening, num_experts=1, dtype=jnp.float32,
        param_dtype=jnp.float32, rngs=nnx.Rngs(0),
    )  # fmt: skip


def test_raw_widening_changes_only_blocks_that_widen():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    for channels, same in ((4, True), (8, False)):
        standard, raw = (block(flag, channels)(x, Context()) for flag in (False, True))
        assert bool(jnp.allclose(standard, raw)) == same
    by_hand = block(True, 8)
    y = by_hand.conv1(x, Context())
    y = by_hand.conv2(jax.nn.relu(by_hand.bn2(y, Context())), Context())
    expected = y + by_hand.shortcut(x, Context())
    np.testing.assert_allclose(by_hand(x, Context()), expected, atol=1e-6)


def test_raw_widening_keeps_the_sizes():
    def params(raw):
        model = nnx.eval_shape(
            lambda: WideResNet(28, 4, in_channels=3, num_classes=10, num_experts=2, ratio=0.5,
                               raw_widening=raw, rngs=nnx.Rngs(0))
        )  # fmt: skip
        return count_params(nnx.state(model, nnx.Param))

    assert params(True) == params(False) == 2_924_530


@pytest.mark.parametrize("size", [1, 2, 4, 5, 14])
def test_vgg_pools_to_2x2_as_adaptive_pooling_does(size):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    expected = np.zeros((2, 2, 2, 3))
    for i in range(2):
        for j in range(2):
            rows = slice(i * size // 2, -(-(i + 1) * size // 2))
            columns = slice(j * size // 2, -(-(j + 1) * size // 2))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(vgg._pool_to_2x2(x), expected, atol=1e-6)
