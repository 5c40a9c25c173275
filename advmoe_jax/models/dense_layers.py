"""Layers that dense networks alone have: convolutions with bias or one per channel, dropout."""

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.models.layers import Context, Conv, normal_init, uniform_init
from advmoe_jax.types import Array


def fan_in_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """He-normal over the fan-in for kernels [kh, kw, C_in, C_out]."""
    return normal_init(key, shape, math.sqrt(2 / math.prod(shape[:-1])), dtype)


def default_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """What PyTorch draws kernels [kh, kw, C_in, C_out] from by default, see ``uniform_init``."""
    return uniform_init(key, shape, math.prod(shape[:-1]), dtype)


class BiasedConv(Conv):
    """A convolution drawn by ``fan_in_init``, and a ``bias`` [C_out] of zeros."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        stride: int = 1,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(in_channels, out_channels, size, stride, init=fan_in_init, **types)
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype))

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C_in] -> [B, H', W', C_out] in ``dtype``."""
        y = super().__call__(x, context)
        return y + self.bias[...].astype(y.dtype)


class DepthwiseConv(nnx.Module):
    """A 3x3 convolution of each channel alone, padded by 1; ``kernel`` [3, 3, 1, C]."""

    def __init__(
        self,
        channels: int,
        stride: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(default_init(rngs.params(), (3, 3, 1, channels), param_dtype))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C] -> [B, H / stride, W / stride, C] in ``dtype``."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        # On the CPU backend grouped convolutions are on a naive path, with their gradients.
        return lax.platform_dependent(x, kernel, cpu=self._by_taps, default=self._grouped)

    def _grouped(self, x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    def _by_taps(self, x: Array, kernel: Array) -> Array:
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            x[:, i : i + height : self.stride, j : j + width : self.stride] * kernel[i, j, 0]
            for i in range(3)
            for j in range(3)
        ]
        return sum(taps[1:], taps[0])


def max_pool(x: Array) -> Array:
    """2x2 max pool of stride 2: [B, H, W, C] -> [B, H // 2, W // 2, C].

    As ``nnx.max_pool``, whose gradient takes the CPU backend thirty times as long as this one's.
    Among equal values the gradient is split here, and goes to the first there.
    """
    height, width = (n // 2 * 2 for n in x.shape[1:3])
    corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
    return jnp.maximum(jnp.maximum(*corners[:2]), jnp.maximum(*corners[2:]))


def dropout(x: Array, rate: float, keys: Array | None, site: int) -> Array:
    """``x`` with a share ``rate`` of its entries 0 and the rest scaled up, image by image.

    Args:
        x: [B, ...].
        rate: in [0, 1).
        keys: one per image [B]; None: not in training, and nothing is dropped.
        site: a number of its own for every place of a network where this is done.
    """
    if not rate or keys is None:
        return x

    def kept_of(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(kept_of)(keys), x / (1 - rate), 0)


class Dropout(nnx.Module):
    """``dropout`` as a layer of its own; in training mode alone.

    Args:
        rate: in (0, 1).
        number: tells the dropout layers of a network apart.
    """

    def __init__(self, rate: float, number: int) -> None:
        self.rate, self.number = rate, number

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, features] -> the same."""
        return dropout(x, self.rate, context.keys, self.number)
