"""Convolutions with one kernel per expert."""

import re
from collections.abc import Callable
from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.layers import Context, Conv, conv2d, conv_init
from advmoe_jax.routing import dispatch

Array = jax.Array


class MoEConv(nnx.Module):
    """A convolution whose kernel is chosen per image; ``kernel`` [N, size, size, C_in, C_out].

    The output of each chosen expert is multiplied by the gate's weight, which is where the
    router's gradient comes from (Zhang et al., ICCV 2023, section 3). ``number`` counts the MoE
    layers of a network; it is given by ``number_layers``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        num_experts: int,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (num_experts, size, size, in_channels, out_channels)
        self.kernel = nnx.Param(conv_init(rngs.params(), shape, param_dtype))
        self.stride, self.padding, self.dtype = stride, padding, dtype
        self.number = 0

    def __call__(self, x: Array, context: Context) -> Array:
        """Images or rows [., H, W, C_in] -> the same, [., H', W', C_out]."""
        convolve = partial(conv2d, stride=self.stride, padding=self.padding)
        plan, weights = context.plan, context.weights
        if context.route is not None:
            plan, weights = context.route(self.number, x)
        x, kernel = x.astype(self.dtype), self.kernel[...]
        if context.expert is not None:
            return _weighted(convolve(x, kernel[context.expert]), weights)
        if context.is_sorted:
            rows = dispatch.map_experts(convolve, x, plan, (kernel,))
            if weights is not None:
                weights = dispatch.row_weights(weights, plan)
            return _weighted(rows, weights)
        return dispatch.apply_experts(convolve, x, plan, weights, (kernel,))

    def idle_params(self, top_k: int) -> int:
        """How many of its parameters an image does not use that has ``top_k`` experts."""
        num_experts = self.kernel.shape[0]
        return self.kernel.size // num_experts * (num_experts - top_k)


def _weighted(rows: Array, weights: Array | None) -> Array:
    if weights is None:
        return rows
    return rows * weights.astype(rows.dtype)[:, None, None, None]


def conv_factory(num_experts: int) -> Callable[..., nnx.Module]:
    """The convolution of a backbone's blocks: plain for one expert, ``MoEConv`` for more."""
    return Conv if num_experts == 1 else partial(MoEConv, num_experts=num_experts)


def number_layers(backbone: nnx.Module) -> dict[str, MoEConv]:
    """Numbers the MoE layers of a backbone from 0, and gives them by name in that order.

    Names are paths of attributes, such as ``layer1_0_conv1``; their natural order (2 before 10) is
    the order of execution.
    """
    found = {
        "_".join(map(str, path)): node
        for path, node in nnx.iter_graph(backbone)
        if isinstance(node, MoEConv)
    }

    def natural(name: str) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    ordered = sorted(found, key=natural)
    for number, name in enumerate(ordered):
        found[name].number = number
    return {name: found[name] for name in ordered}
