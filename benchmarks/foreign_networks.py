"""A trained ResNet of this package as strangers would have written it, on the same weights.

As a plain JAX function, in flax.linen, in Equinox and in PyTorch. None of them uses a layer of this
package. Equinox and PyTorch are optional.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import BatchNorm
from advmoe_jax.runs.trained import Run
from advmoe_jax.types import Array, Images, Logits, Tree


class Conv(NamedTuple):
    """A convolution with the BatchNorm behind it folded in: kernel [h, w, in, out], bias [out]."""

    kernel: Array
    bias: Array


class Block(NamedTuple):
    """A basic block; ``shortcut`` is None where images pass unchanged."""

    first: Conv
    second: Conv
    shortcut: Conv | None


class Weights(NamedTuple):
    """A ResNet; its first layer sees images in [0, 1], since what normalises them is apart."""

    mean: Array
    std: Array
    stem: Conv
    blocks: tuple[Block, ...]
    head: Array
    head_bias: Array


def read_weights(run: Run) -> Weights:
    """The network of a run, every BatchNorm folded into the convolution before it.

    Raises:
        UserError: if it is no dense CIFAR ResNet of basic blocks.
    """
    model = run.config.model
    if run.network.is_moe or not (model.name.startswith("resnet") and model.name.endswith("cifar")):
        raise UserError(f"{run.where}: give a run of a dense ResNet for CIFAR, not of {model.name}")
    if any("conv3" in block for block in run.params["backbone"].values()):
        raise UserError(f"{run.where}: {model.name} has bottleneck blocks; give one of basic ones")
    return fold(run.params, run.stats, model.mean, model.std)


def fold(params: Tree, stats: Tree, mean: Sequence[float], std: Sequence[float]) -> Weights:
    """The weights of a dense CIFAR ResNet as it answers, for images normalised by mean and std."""
    params, stats = params["backbone"], stats["backbone"]

    def conv(params: Tree, stats: Tree, conv: str, norm: str) -> Conv:
        scale = params[norm]["scale"] / jnp.sqrt(stats[norm]["var"] + BatchNorm(1).epsilon)
        bias = params[norm]["bias"] - stats[norm]["mean"] * scale
        return Conv(params[conv]["kernel"] * scale, bias)

    def block(name: str) -> Block:
        of_block = partial(conv, params[name], stats[name])
        return Block(
            of_block("conv1", "bn1"),
            of_block("conv2", "bn2"),
            of_block("shortcut_conv", "shortcut_bn") if "shortcut_conv" in params[name] else None,
        )

    return Weights(
        jnp.asarray(mean),
        jnp.asarray(std),
        conv(params, stats, "stem", "bn"),
        tuple(block(name) for name in sorted(params) if name.startswith("layer")),
        params["head"]["kernel"],
        params["head"]["bias"],
    )


def _strides(weights: Weights) -> list[int]:
    """A block that projects halves the resolution, in every CIFAR ResNet of basic blocks."""
    return [1 if block.shortcut is None else 2 for block in weights.blocks]


def plain(layout: str, weights: Weights) -> Callable[[Images], Logits]:
    """A JAX function whose convolutions see images in this layout: NHWC or NCHW."""
    dims = (layout, "HWIO", layout)
    channels = (1, 1, 1, -1) if layout == "NHWC" else (1, -1, 1, 1)

    def conv(x: Array, conv: Conv, stride: int = 1) -> Array:
        pad = conv.kernel.shape[0] // 2
        y = lax.conv_general_dilated(
            x, conv.kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=dims
        )
        return y + conv.bias.reshape(channels)

    def function(weights: Weights, images: Images) -> Logits:
        x = images if layout == "NHWC" else images.transpose(0, 3, 1, 2)
        x = (x - weights.mean.reshape(channels)) / weights.std.reshape(channels)
        x = jax.nn.relu(conv(x, weights.stem))
        for block, stride in zip(weights.blocks, _strides(weights), strict=True):
            y = jax.nn.relu(conv(x, block.first, stride))
            y = conv(y, block.second)
            x = x if block.shortcut is None else conv(x, block.shortcut, stride)
            x = jax.nn.relu(x + y)
        pooled = x.mean((1, 2) if layout == "NHWC" else (2, 3))
        return pooled @ weights.head + weights.head_bias

    return partial(function, weights)


def linen(weights: Weights) -> Callable[[Images], Logits]:
    """In flax.linen, as its users write a ResNet."""
    import flax.linen as nn

    strides = _strides(weights)

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, images: Images) -> Logits:
            names = (f"conv{i}" for i in itertools.count())

            def conv(x: Array, conv: Conv, stride: int = 1) -> Array:
                size, channels = conv.kernel.shape[0], conv.kernel.shape[-1]
                pad = [(size // 2, size // 2)] * 2
                layer = nn.Conv(channels, (size, size), stride, pad, name=next(names))
                return layer(x)

            x = nn.relu(conv((images - weights.mean) / weights.std, weights.stem))
            for block, stride in zip(weights.blocks, strides, strict=True):
                y = nn.relu(conv(x, block.first, stride))
                y = conv(y, block.second)
                x = x if block.shortcut is None else conv(x, block.shortcut, stride)
                x = nn.relu(x + y)
            return nn.Dense(weights.head.shape[-1], name="head")(x.mean((1, 2)))

    params = {f"conv{i}": conv._asdict() for i, conv in enumerate(_convs(weights))}
    params["head"] = {"kernel": weights.head, "bias": weights.head_bias}
    return partial(ResNet().apply, {"params": params})


def equinox(weights: Weights) -> Callable[[Images], Logits]:
    """In Equinox, whose layers see one image [C, H, W]."""
    import equinox as eqx

    key = jax.random.key(0)

    class Layers(eqx.Module):
        convs: list[eqx.nn.Conv2d]
        head: eqx.nn.Linear

    def conv(conv: Conv, stride: int) -> eqx.nn.Conv2d:
        size, _, inputs, outputs = conv.kernel.shape
        layer = eqx.nn.Conv2d(inputs, outputs, size, stride, size // 2, key=key)
        kernel = conv.kernel.transpose(3, 2, 0, 1)
        found = (kernel, conv.bias[:, None, None])
        return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, found)

    strides = [1]
    for block, stride in zip(weights.blocks, _strides(weights), strict=True):
        strides += [stride, 1] if block.shortcut is None else [stride, 1, stride]
    convs = [conv(*pair) for pair in zip(_convs(weights), strides, strict=True)]
    head = eqx.nn.Linear(*weights.head.shape, key=key)
    given = (weights.head.T, weights.head_bias)
    head = eqx.tree_at(lambda layer: (layer.weight, layer.bias), head, given)

    def of_image(model: Layers, image: Array) -> Array:
        convs = iter(model.convs)
        x = image.transpose(2, 0, 1)
        x = (x - weights.mean[:, None, None]) / weights.std[:, None, None]
        x = jax.nn.relu(next(convs)(x))
        for block in weights.blocks:
            y = jax.nn.relu(next(convs)(x))
            y = next(convs)(y)
            x = jax.nn.relu(y + (x if block.shortcut is None else next(convs)(x)))
        return model.head(x.mean((1, 2)))

    arrays, rest = eqx.partition(Layers(convs, head), eqx.is_array)

    def function(arrays: Any, images: Images) -> Logits:
        return jax.vmap(partial(of_image, eqx.combine(arrays, rest)))(images)

    return partial(function, arrays)


def _convs(weights: Weights) -> list[Conv]:
    """In the order in which they are applied: a block's shortcut last."""
    blocks = [conv for block in weights.blocks for conv in block if conv is not None]
    return [weights.stem, *blocks]


WRITINGS = {
    "plain": partial(plain, "NHWC"),
    "plain_nchw": partial(plain, "NCHW"),
    "linen": linen,
    "equinox": equinox,
}


def torch_network(weights: Weights) -> Any:
    """In PyTorch, in inference mode; images [B, C, H, W]."""
    import torch
    from torch import nn

    def tensor(x: Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float32))

    def conv(conv: Conv, stride: int = 1) -> nn.Conv2d:
        size, _, inputs, outputs = conv.kernel.shape
        layer = nn.Conv2d(inputs, outputs, size, stride, size // 2)
        layer.weight.data = tensor(conv.kernel.transpose(3, 2, 0, 1))
        layer.bias.data = tensor(conv.bias)
        return layer

    class Basic(nn.Module):
        def __init__(self, block: Block, stride: int) -> None:
            super().__init__()
            self.first, self.second = conv(block.first, stride), conv(block.second)
            self.shortcut = nn.Identity()
            if block.shortcut is not None:
                self.shortcut = conv(block.shortcut, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.second(torch.relu(self.first(x)))
            return torch.relu(y + self.shortcut(x))

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", tensor(weights.mean)[:, None, None])
            self.register_buffer("std", tensor(weights.std)[:, None, None])
            self.stem = conv(weights.stem)
            pairs = zip(weights.blocks, _strides(weights), strict=True)
            self.blocks = nn.Sequential(*(Basic(*pair) for pair in pairs))
            self.head = nn.Linear(*weights.head.shape)
            self.head.weight.data = tensor(weights.head.T)
            self.head.bias.data = tensor(weights.head_bias)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.stem((images - self.mean) / self.std))
            return self.head(self.blocks(x).mean((2, 3)))

    return ResNet().eval()
