"""Layers with one set of parameters per expert.

An expert layer declares how many experts it has, how wide its input is and, by the type
``ExpertParam``, which of its parameters are stacked: routers, costs and training ask for no more.
"""

import re
from collections.abc import Callable
from functools import partial

import flax.nnx as nnx
import jax.numpy as jnp

from advmoe_jax.models.layers import Context, Conv, conv2d, conv_init
from advmoe_jax.routing import dispatch
from advmoe_jax.types import Array


class ExpertParam(nnx.Param):
    """A parameter whose first axis counts the experts."""


class ExpertLayer(nnx.Module):
    """What every layer of experts has.

    Attributes:
        num_experts: to choose among.
        in_features: size of the last axis of the layer's input.
        number: counts the expert layers of a network; it is given by ``number_layers``.
    """

    num_experts: int
    in_features: int
    number: int

    def idle_params(self, top_k: int) -> int:
        """How many parameters a sample does not use: those of the experts not chosen."""
        stacked = [p for _, p in nnx.iter_graph(self) if isinstance(p, ExpertParam)]
        of_one = sum(p.size for p in stacked) // self.num_experts
        return of_one * (self.num_experts - top_k)


class MoEConv(ExpertLayer):
    """A convolution whose kernel is chosen per image; ``kernel`` [N, size, size, C_in, C_out].

    The output of each chosen expert is multiplied by the gate's weight, which is where the
    router's gradient comes from (Zhang et al., ICCV 2023, section 3).
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
        self.kernel = ExpertParam(conv_init(rngs.params(), shape, param_dtype))
        self.stride, self.padding, self.dtype = stride, padding, dtype
        self.num_experts, self.in_features, self.number = num_experts, in_channels, 0

    def __call__(self, x: Array, context: Context) -> Array:
        """Images or rows [., H, W, C_in] -> the same, [., H', W', C_out]."""
        convolve = partial(conv2d, stride=self.stride, padding=self.padding)
        plan, weights = context.plan, context.weights
        if context.route is not None:
            plan, weights = context.route(self.number, x)
        x, kernel = x.astype(self.dtype), self.kernel[...]
        if context.expert is not None:
            kernel = dispatch.of_expert(kernel.astype(self.dtype), context.expert)
            return _weighted(convolve(x, kernel), weights)
        if context.is_sorted:
            rows = dispatch.map_experts(convolve, x, plan, (kernel,))
            if weights is not None:
                weights = dispatch.row_weights(weights, plan)
            return _weighted(rows, weights)
        if isinstance(plan, dispatch.Every):
            return _every(convolve, x, dispatch.shares(plan, weights, self.num_experts), kernel)
        return dispatch.apply_experts(convolve, x, plan, weights, (kernel,))


def _every(
    convolve: Callable[[Array, Array], Array], x: Array, shares: Array, kernel: Array
) -> Array:
    """The weighted sum of all experts' convolutions, by a single one of N times the channels.

    A convolution is linear in its input, so a weight may come before it: ``shares`` [B, N], zero
    for experts that are not chosen. Nothing of N times the outputs is made, and no sum over them;
    the TPU's compiler estimates a sixth less for a training pass (docs/accelerators.md).
    """
    experts, *size, channels_in, channels_out = kernel.shape
    x = x[..., None, :] * shares.astype(x.dtype)[:, None, None, :, None]
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(*size, experts * channels_in, channels_out)
    return convolve(x.reshape(*x.shape[:3], -1), kernel.astype(x.dtype))


def _weighted(rows: Array, weights: Array | None) -> Array:
    if weights is None:
        return rows
    return rows * weights.astype(rows.dtype)[:, None, None, None]


def conv_factory(num_experts: int) -> Callable[..., nnx.Module]:
    """The convolution of a backbone's blocks: plain for one expert, ``MoEConv`` for more."""
    return Conv if num_experts == 1 else partial(MoEConv, num_experts=num_experts)


def number_layers(backbone: nnx.Module) -> dict[str, ExpertLayer]:
    """Numbers the expert layers of a backbone from 0, and gives them by name in that order.

    Names are paths of attributes, such as ``layer1_0_conv1``; their natural order (2 before 10) is
    the order of execution.
    """
    found = {
        "_".join(map(str, path)): node
        for path, node in nnx.iter_graph(backbone)
        if isinstance(node, ExpertLayer)
    }

    def natural(name: str) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    ordered = sorted(found, key=natural)
    for number, name in enumerate(ordered):
        found[name].number = number
    return {name: found[name] for name in ordered}
