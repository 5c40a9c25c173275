"""Layers of SmallCNN and MobileNetV2, against PyTorch."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models.dense_layers import BiasedConv, DepthwiseConv, Dropout, max_pool
from advmoe_jax.models.layers import Context

torch = pytest.importorskip("torch")


def chw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_a_depthwise_convolution_is_pytorchs_by_either_way(stride, size):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 6))
    conv = DepthwiseConv(6, stride, rngs=nnx.Rngs(0))
    kernel = torch.from_numpy(np.array(conv.kernel[...])).permute(3, 2, 0, 1)
    expected = torch.nn.functional.conv2d(chw(x), kernel, stride=stride, padding=1, groups=6)
    expected = expected.permute(0, 2, 3, 1).numpy()
    for found in (conv(x, Context()), conv._grouped(x, conv.kernel[...])):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [4, 5])
def test_the_pool_and_its_gradient_are_pytorchs(size):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    theirs = chw(x).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(theirs, 2)
    (pooled**2).sum().backward()
    np.testing.assert_array_equal(max_pool(x), pooled.detach().permute(0, 2, 3, 1))
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x) ** 2))(x)
    np.testing.assert_allclose(gradient, theirs.grad.permute(0, 2, 3, 1), rtol=1e-6)


def test_a_biased_convolution_adds_its_bias():
    conv = BiasedConv(2, 3, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    before = conv(x, Context())
    conv.bias[...] = jnp.arange(3.0)
    np.testing.assert_allclose(
        conv(x, Context()) - before, np.tile([0, 1, 2.0], (1, 2, 2, 1)), 1e-6
    )


def test_dropout_draws_by_image_and_only_in_training():
    layer, x = Dropout(0.5, 0), jnp.ones((4, 1000))
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(layer(x, Context()), x)
    dropped = layer(x, Context(train=True, keys=keys))
    assert set(np.unique(dropped)) == {0.0, 2.0} and np.mean(dropped) == pytest.approx(1, abs=0.1)
    # An image's mask does not hang on its batch; another layer's is another.
    again = layer(x[2:], Context(train=True, keys=keys[2:]))
    np.testing.assert_array_equal(again, dropped[2:])
    other = Dropout(0.5, 1)(x, Context(train=True, keys=keys))
    assert np.any(other != dropped)
    # A pass without keys, such as one that an attack looks at, draws nothing.
    np.testing.assert_array_equal(layer(x, Context(train=True)), x)
