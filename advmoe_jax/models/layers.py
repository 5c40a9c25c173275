"""Convolution, normalisation and initialisers shared by every backbone.

Layers are NHWC with HWIO kernels. Parameters and statistics are float32 unless told otherwise;
``dtype`` is the dtype of compute.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.models.sparse import ChannelScore, channel_mask, select
from advmoe_jax.routing.dispatch import Every, Plan
from advmoe_jax.routing.exchange import AnyPlan
from advmoe_jax.types import Array, Axes, Logits

_DRAWN_AT_ONCE = 2**20
_MOST_PIECES = 256
_PART = 16  # images of a batch that a kernel's gradient is computed of at once, on CPU


@jax.jit
def _draw(key: Array) -> Array:
    return jax.random.normal(key, (_DRAWN_AT_ONCE,))


def normal_init(
    key: Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype = jnp.float32
) -> Array:
    """N(0, std^2) of any shape.

    Drawn in pieces of one size, because XLA takes seconds to compile a generator of normal numbers
    and would do so for every shape of a network.
    """
    if not std:
        return jnp.zeros(shape, dtype)
    size = math.prod(shape)
    count = -(-size // _DRAWN_AT_ONCE)
    if count > _MOST_PIECES:  # a program of so many calls would take minutes to trace
        drawn = lax.map(lambda i: _draw(jax.random.fold_in(key, i)), jnp.arange(count)).ravel()
    else:
        drawn = jnp.concatenate([_draw(jax.random.fold_in(key, i)) for i in range(count)])
    return (std * drawn[:size]).reshape(shape).astype(dtype)


def uniform_init(
    key: Array, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype = jnp.float32
) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what PyTorch draws weights and biases from by default."""
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv_init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """He-normal over the fan-out for kernels [..., kh, kw, C_in, C_out], as published."""
    height, width, _, out_channels = shape[-4:]
    return normal_init(key, shape, math.sqrt(2 / (height * width * out_channels)), dtype)


class Heads(NamedTuple):
    """What a backbone with several heads answers; others answer with their logits alone.

    Attributes:
        logits: float32, of the main head.
        exits: float32, of every exit, the main one last. Not stacked: who looks at one exit alone
            pays for the network up to it, backwards too.
    """

    logits: Logits
    exits: tuple[Logits, ...]


class Context(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        train: normalise with the batch's statistics and update the running ones.
        axis_name: mapped axis over which batch statistics are synchronised, if any.
        plan: how samples find their experts; None in a dense network and in a router.
        weights: float32 [B, k], the gate's weight of each choice; None where all are 1 and samples
            are sorted.
        is_sorted: samples travel through the network as the plan's rows (one route per image,
            top-1: sorted once, at the images); otherwise every MoE layer sorts and restores.
        surrogate: a Sparse network's choice of channels has its surrogate gradient.
        route: (number of an MoE layer, its input) -> plan and weights of that layer, where every
            layer is routed by itself; None where all follow one route.
        expert: int32 scalar: this part of the batch belongs to one expert, and ``weights`` are
            float32 [B], of its samples, or None; None where a plan says who belongs to whom.
        remat: activations inside a backbone's layers are computed again for the gradient.
        keys: one PRNG key per image, of what is drawn in training (dropout); None: nothing is.
    """

    train: bool = False
    axis_name: Axes | None = None
    plan: Plan | Every | None = None
    weights: Array | None = None
    is_sorted: bool = False
    surrogate: bool = False
    route: Callable[[int, Array], tuple[AnyPlan, Array]] | None = None
    expert: Array | None = None
    remat: bool = False
    keys: Array | None = None


def run_layer(layer: nnx.Module, x: Array, context: Context) -> Array:
    """One block of a backbone; under ``context.remat`` only its input is kept for the gradient."""
    if not context.remat:
        return layer(x, context)
    return nnx.remat(lambda layer, x: layer(x, context))(layer, x)


def _plain_conv(
    x: Array, kernel: Array, stride: int, padding: int, precision: lax.Precision | None
) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _image_gradient(x: Array, kernel: Array, g: Array, stride: int, padding: int) -> Array:
    """The gradient to a convolution's input, as a convolution in NHWC/HWIO."""
    sizes = zip(x.shape[1:3], g.shape[1:3], kernel.shape[:2], strict=True)
    pads = [(k - 1 - padding, n + padding - 1 - (out - 1) * stride) for n, out, k in sizes]
    return lax.conv_general_dilated(
        g,
        jnp.flip(kernel, (0, 1)).swapaxes(2, 3),
        window_strides=(1, 1),
        padding=pads,
        lhs_dilation=(stride, stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _kernel_gradient(x: Array, kernel: Array, g: Array, stride: int, padding: int) -> Array:
    """The gradient to a convolution's kernel, as convolutions in NHWC/HWIO.

    Large inputs go through a loop over parts of the batch: outside one, XLA computes whatever made
    ``x`` and ``g`` again inside the transposes below, element by element.
    """
    batch, size = x.shape[0], kernel.shape[:2]
    if size == (1, 1) and padding == 0:
        return jnp.einsum("bhwi,bhwo->io", x[:, ::stride, ::stride], g)[None, None]
    # The padding stays in the window: a separate pad would join the transpose in one loop, which
    # takes five times as long as the convolution. Rows and columns that no output reads are cut
    # off, because they would be negative padding.
    sizes = zip(x.shape[1:3], g.shape[1:3], size, strict=True)
    high = [k + (out - 1) * stride - n - padding for n, out, k in sizes]
    x = x[:, : x.shape[1] + min(high[0], 0), : x.shape[2] + min(high[1], 0)]

    def of_part(images: Array, gradient: Array) -> Array:
        out = lax.conv_general_dilated(
            images.transpose(3, 1, 2, 0),
            gradient.transpose(1, 2, 0, 3),
            window_strides=(1, 1),
            padding=[(padding, max(h, 0)) for h in high],
            rhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out.transpose(1, 2, 0, 3)

    part = max(n for n in range(1, min(batch, _PART) + 1) if batch % n == 0)
    if part == batch or x.size < 4 * kernel.size:
        return of_part(x, g)
    parts = tuple(a.reshape(batch // part, part, *a.shape[1:]) for a in (x, g))
    none = jnp.zeros_like(g, shape=kernel.shape)
    return lax.scan(lambda total, pair: (total + of_part(*pair), None), none, parts)[0]


def _conv_forward(
    x: Array, kernel: Array, stride: int, padding: int, precision: lax.Precision | None
) -> tuple[Array, tuple[Array, Array]]:
    return _plain_conv(x, kernel, stride, padding, precision), (x, kernel)


def _conv_backward(
    stride: int,
    padding: int,
    precision: lax.Precision | None,
    residuals: tuple[Array, Array],
    g: Array,
) -> tuple[Array, Array]:
    def canonical(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        to_images = _image_gradient(x, kernel, g, stride, padding)
        to_kernel = _kernel_gradient(x, kernel, g, stride, padding)
        return _summed_like(x, to_images), _summed_like(kernel, to_kernel)

    def transposed(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        forward = partial(_plain_conv, stride=stride, padding=padding, precision=precision)
        return jax.vjp(forward, x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, cpu=canonical, default=transposed)


def _summed_like(x: Array, gradient: Array) -> Array:
    """Sums over the mesh axes on which ``x`` is the same everywhere but its gradient is not.

    This is what JAX's own gradients do under ``shard_map(check_vma=True)``; elsewhere it is the
    identity, and costs nothing.
    """
    return jax.vjp(lambda x: x + jnp.zeros_like(gradient, shape=()), x)[1](gradient)[0]


_conv = jax.custom_vjp(_plain_conv, nondiff_argnums=(2, 3, 4))
_conv.defvjp(_conv_forward, _conv_backward)


def conv2d(
    x: Array,
    kernel: Array,
    stride: int = 1,
    padding: int = 0,
    precision: lax.Precision | None = None,
) -> Array:
    """2-D convolution (cross-correlation) without bias.

    On the CPU backend XLA runs the transposed convolutions that JAX derives as gradients on a
    naive path inside any ``lax`` loop, 7 to 30 times slower (jax issue 12868). There the gradients
    are written out in the layout that is fast everywhere; on other platforms JAX's own are used.

    Args:
        x: [B, H, W, C_in].
        kernel: [kh, kw, C_in, C_out].
        stride: of both directions.
        padding: zeros added on every side.
        precision: of the products on accelerators; None is JAX's default.

    Returns:
        [B, H', W', C_out] in the dtype of ``x``.
    """
    return _conv(x, kernel.astype(x.dtype), stride, padding, precision)


class Conv(nnx.Module):
    """Convolution without bias; ``kernel`` [size, size, C_in, C_out] drawn by ``init``.

    In a Sparse network (``prune``) it has ``scores`` [C_in] and reads the best ``keep`` channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        precision: lax.Precision | None = None,
        init: Callable[[Array, tuple[int, ...], jnp.dtype], Array] = conv_init,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (size, size, in_channels, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.stride, self.padding = stride, padding
        self.dtype, self.precision = dtype, precision
        self.keep = 0

    def prune(self, share: float) -> None:
        """Gives the input channels scores, all 1, and keeps a share in (0, 1] of them."""
        channels = self.kernel.shape[-2]
        self.keep = max(1, round(share * channels))
        self.scores = ChannelScore(jnp.ones(channels))

    def idle_params(self, top_k: int) -> int:
        """How many parameters an image does not use: those of the channels that are not read."""
        channels = self.kernel.shape[-2]
        return self.kernel.size // channels * (channels - self.keep) if self.keep else 0

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C_in] -> [B, H', W', C_out] in ``dtype``."""
        x, kernel = x.astype(self.dtype), self.kernel[...]
        if self.keep and context.surrogate:  # every channel, so that every score has a gradient
            kernel = kernel * channel_mask(self.scores[...], self.keep)[:, None]
        elif self.keep:
            x, kernel = select(x, kernel, self.scores[...], self.keep)
        return conv2d(x, kernel, self.stride, self.padding, self.precision)


class Linear(nnx.Module):
    """Affine map; ``kernel`` [in, out] drawn from N(0, std^2), ``bias`` [out] of zeros.

    ``uniform``: both drawn by ``uniform_init`` instead. Computes in float32 at full precision,
    always.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        std: float = 0.01,
        uniform: bool = False,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        if uniform:
            self.kernel = nnx.Param(uniform_init(rngs.params(), shape, in_features, param_dtype))
            self.bias = nnx.Param(uniform_init(rngs.params(), shape[1:], in_features, param_dtype))
            return
        self.kernel = nnx.Param(normal_init(rngs.params(), shape, std, param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype))

    def __call__(self, x: Array) -> Array:
        """[B, in] -> float32 [B, out]."""
        kernel, bias = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return jnp.dot(x.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST) + bias


class BatchNorm(nnx.Module):
    """Batch normalisation over batch, height and width (Ioffe and Szegedy, 2015).

    The conventions are PyTorch's, so that networks can be compared number by number: the batch is
    normalised with its biased variance, the running variance takes the unbiased one, and the
    running statistics move by ``momentum`` = 0.1 towards the batch's. Statistics are float32,
    synchronised over ``context.axis_name``, and ignore a dispatch plan's rows of padding.
    """

    def __init__(
        self,
        channels: int,
        *,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        param_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C] -> the same shape and dtype."""
        if context.train:
            mean, var, count = _batch_moments(x, context, self.mean[...])
            unbiased = var * (count / max(count - 1, 1))
            self.mean[...] += self.momentum * (lax.stop_gradient(mean) - self.mean[...])
            self.var[...] += self.momentum * (lax.stop_gradient(unbiased) - self.var[...])
        else:
            mean, var = self.mean[...], self.var[...]
        scale, shift = self.affine(mean, var)
        return (x.astype(jnp.float32) * scale + shift).astype(x.dtype)

    def affine(self, mean: Array, var: Array) -> tuple[Array, Array]:
        """Scale and shift, float32 [C] each, with these statistics."""
        scale = self.scale[...].astype(jnp.float32) * lax.rsqrt(var + self.epsilon)
        return scale, self.bias[...].astype(jnp.float32) - mean * scale


def _batch_moments(x: Array, context: Context, near: Array) -> tuple[Array, Array, float]:
    """Mean [C], biased variance [C] and number of values per channel, over all devices.

    ``near`` [C] is the running mean, the same on all devices: close to the batch's, as a rule.
    """
    x, weight, rows = x.astype(jnp.float32), jnp.ones((), jnp.float32), x.shape[0]
    if context.is_sorted:  # every choice has a row of its own, the others are padding
        weight = context.plan.valid.astype(jnp.float32)[:, None, None, None]
        rows = context.plan.position.size
    devices = 1 if context.axis_name is None else lax.axis_size(context.axis_name)
    count = float(rows * x.shape[1] * x.shape[2] * devices)

    def sum_of(values: Array) -> Array:
        return jnp.sum(values * weight, (0, 1, 2))

    if devices == 1:
        mean = sum_of(x) / count
        # The second pass costs one reduction and avoids the cancellation of E[x^2] - E[x]^2.
        return mean, sum_of(jnp.square(x - mean)) / count, count
    # A network waits for every sum over devices, so that both moments share one. Little cancels
    # here, for they are taken about the running mean; on which they depend by rounding alone.
    x = x - lax.stop_gradient(near)
    sums = jnp.stack([sum_of(x), sum_of(jnp.square(x))])
    first, second = lax.psum(sums, context.axis_name) / count
    return near + first, jnp.maximum(second - jnp.square(first), 0), count
