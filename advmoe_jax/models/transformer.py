"""Layers of vision transformers on tokens [B, T, D], as V-MoE's published code has them.

Matrices are multiplied in ``dtype``; normalisation, softmax and routing are float32. Nothing is
drawn in inference; in training every image draws with a key of its own, so that a batch gives the
same however it is split over devices.
"""

import math
from collections.abc import Sequence

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from advmoe_jax.models.dense_layers import dropout
from advmoe_jax.models.layers import Context, normal_init
from advmoe_jax.models.moe import ExpertLayer, ExpertParam
from advmoe_jax.routing import exchange
from advmoe_jax.types import Array

Tokens = Float[Array, "batch tokens width"]
_BIAS_STD = 1e-6  # of the MLPs' biases, published


def xavier_uniform(
    key: Array, shape: tuple[int, ...], in_features: int, out_features: int, dtype: jnp.dtype
) -> Array:
    """U(-a, a) with a = sqrt(6 / (in + out)) (Glorot and Bengio, 2010)."""
    bound = math.sqrt(6 / (in_features + out_features))
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound).astype(dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32 (Ba et al., 2016); epsilon 1e-6."""

    def __init__(self, features: int, *, param_dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: Array) -> Array:
        """[..., features] -> float32 of the same shape."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scale = lax.rsqrt(variance + 1e-6) * self.scale[...].astype(jnp.float32)
        return centred * scale + self.bias[...].astype(jnp.float32)


class Dense(nnx.Module):
    """Affine map of the last axis, or of the last few; Xavier-uniform ``kernel`` [*in, *out]."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        *,
        bias_std: float = 0.0,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        shape, sizes = (*inputs, *outputs), (math.prod(inputs), math.prod(outputs))
        self.kernel = nnx.Param(xavier_uniform(rngs.params(), shape, *sizes, param_dtype))
        self.bias = nnx.Param(normal_init(rngs.params(), tuple(outputs), bias_std, param_dtype))
        self.axes, self.dtype = len(inputs), dtype

    def __call__(self, x: Array) -> Array:
        """[..., *in] -> [..., *out] in ``dtype``."""
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        return jnp.tensordot(x.astype(self.dtype), kernel, self.axes) + bias


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al., 2017), softmax in float32."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dropout: float,
        site: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        split = (heads, width // heads)
        self.query = Dense((width,), split, **types)
        self.key = Dense((width,), split, **types)
        self.value = Dense((width,), split, **types)
        self.out = Dense(split, (width,), **types)
        self.dropout, self.site = dropout, site

    def __call__(self, x: Tokens, context: Context) -> Tokens:
        """Tokens of the same shape, each a mean over all of its image."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query / math.sqrt(query.shape[-1]), key)
        shares = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        shares = dropout(shares, self.dropout, context.keys, self.site)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", shares, value))


class Mlp(nnx.Module):
    """Two layers with GELU (tanh form) between, the MLP of a dense block."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        dropout: float,
        site: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dense1 = Dense((width,), (hidden,), bias_std=_BIAS_STD, **types)
        self.dense2 = Dense((hidden,), (width,), bias_std=_BIAS_STD, **types)
        self.dropout, self.site = dropout, site

    def __call__(self, x: Tokens, context: Context) -> Tokens:
        """Every token by itself."""
        hidden = jax.nn.gelu(self.dense1(x))
        hidden = dropout(hidden, self.dropout, context.keys, self.site)
        return dropout(self.dense2(hidden), self.dropout, context.keys, self.site + 1)


class ExpertDense(nnx.Module):
    """One affine map per expert: ``kernel`` [N, in, out], ``bias`` [N, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        identical: bool,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        drawn = 1 if identical else num_experts
        shape = (drawn, in_features, out_features)
        kernel = xavier_uniform(rngs.params(), shape, in_features, out_features, param_dtype)
        bias = normal_init(rngs.params(), (drawn, out_features), _BIAS_STD, param_dtype)
        copies = num_experts // drawn
        self.kernel = ExpertParam(jnp.tile(kernel, (copies, 1, 1)))
        self.bias = ExpertParam(jnp.tile(bias, (copies, 1)))


class ExpertMlp(ExpertLayer):
    """An ``Mlp`` for each expert; every token goes to those that its router chose.

    A token's output is the sum of its chosen experts', each multiplied by the gate's weight;
    choices without a place have weight 0, and the residual alone remains of their tokens.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        num_experts: int,
        identical: bool,
        dropout: float,
        site: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"identical": identical, "param_dtype": param_dtype, "rngs": rngs}
        self.dense1 = ExpertDense(width, hidden, num_experts, **types)
        self.dense2 = ExpertDense(hidden, width, num_experts, **types)
        self.num_experts, self.in_features, self.number = num_experts, width, 0
        self.dropout, self.site, self.dtype = dropout, site, dtype

    def __call__(self, x: Tokens, context: Context) -> Tokens:
        """Every token by itself."""
        plan, weights = context.route(self.number, x)
        tokens = x.astype(self.dtype)
        hidden, stochastic = self.dense1.kernel.shape[-1], self.dropout and context.keys is not None
        if stochastic:  # the mask of a token's hidden units travels beside it
            ones = jnp.ones((*x.shape[:-1], hidden), self.dtype)
            mask = dropout(ones, self.dropout, context.keys, self.site)
            tokens = jnp.concatenate([tokens, mask], axis=-1)
        dense = (self.dense1, self.dense2)
        parameters = [p[...].astype(self.dtype) for d in dense for p in (d.kernel, d.bias)]
        rows = tokens.reshape(-1, tokens.shape[-1])
        function = _masked_mlp if stochastic else mlp
        out = exchange.apply_experts(function, rows, plan, weights, tuple(parameters))
        return dropout(out.reshape(x.shape), self.dropout, context.keys, self.site + 1)


def mlp(rows: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    """What one expert makes of rows [., D]."""
    return jax.nn.gelu(rows @ kernel1 + bias1) @ kernel2 + bias2


def _masked_mlp(rows: Array, kernel1: Array, bias1: Array, kernel2: Array, bias2: Array) -> Array:
    """``mlp`` of rows with the factors of their hidden units behind them."""
    rows, mask = jnp.split(rows, [kernel1.shape[0]], axis=-1)
    return (jax.nn.gelu(rows @ kernel1 + bias1) * mask) @ kernel2 + bias2


class TokenRouter(nnx.Module):
    """A linear map without bias from a token to its scores, in float32 at full precision."""

    def __init__(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> None:
        std = 1 / math.sqrt(width)
        self.kernel = nnx.Param(normal_init(rngs.params(), (width, num_experts), std))

    def __call__(self, x: Tokens, context: Context) -> Float[Array, "batch tokens experts"]:
        """Scores of all experts."""
        return jnp.dot(x.astype(jnp.float32), self.kernel[...], precision=lax.Precision.HIGHEST)
