"""MobileNetV2 (Sandler et al., CVPR 2018) for CIFAR in the form of RDI-Nets; dense alone.

Its ReLU is not clipped at 6, the expansion stands even where it expands by 1, and every block of
stride 1 has a shortcut, by a 1x1 convolution where channels change.
"""

from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.dense_layers import DepthwiseConv, default_init
from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array

# Expansion, channels, blocks, stride of the first.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280
_conv = partial(Conv, init=default_init)


class InvertedBlock(nnx.Module):
    """1x1 convolution to more channels, a 3x3 one of each alone, 1x1 to the channels wanted.

    All are normalised, and the first two rectified.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        expansion: int,
        stride: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        wide = expansion * in_channels
        self.conv1, self.bn1 = _conv(in_channels, wide, 1, **types), _norm(wide, types)
        self.conv2, self.bn2 = DepthwiseConv(wide, stride, **types), _norm(wide, types)
        self.conv3, self.bn3 = _conv(wide, channels, 1, **types), _norm(channels, types)
        self.has_shortcut = stride == 1
        self.project = self.has_shortcut and in_channels != channels
        if self.project:
            self.shortcut_conv = _conv(in_channels, channels, 1, **types)
            self.shortcut_bn = _norm(channels, types)

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C_in] -> [B, H / stride, W / stride, C_out]."""
        y = jax.nn.relu(self.bn1(self.conv1(x, context), context))
        y = jax.nn.relu(self.bn2(self.conv2(y, context), context))
        y = self.bn3(self.conv3(y, context), context)
        if not self.has_shortcut:
            return y
        if self.project:
            x = self.shortcut_bn(self.shortcut_conv(x, context), context)
        return y + x


class MobileNetV2(Trunk):
    """Seventeen inverted blocks.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: must be 1.
        ratio: scales every width but the stem's.
        dtype: of compute in the convolutions; logits are float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    first = "stem"  # the convolution that reads the image
    is_dense_alone = True

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int = 1,
        ratio: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels, names, self.ratio = STEM, [], ratio
        self.stem = _conv(in_channels, channels, 3, 1, 1, **types)
        self.bn = _norm(channels, types)
        for expansion, planes, count, stride in STAGES:
            for i in range(count):
                wanted, step = int(planes * ratio), stride if i == 0 else 1
                names.append(f"block{len(names) + 1}")
                block = InvertedBlock(channels, wanted, expansion, step, **types)
                setattr(self, names[-1], block)
                channels = wanted
        self.names = tuple(names)
        last = int(LAST * ratio)
        self.conv, self.last_bn = _conv(channels, last, 1, **types), _norm(last, types)
        linear = {"param_dtype": param_dtype, "rngs": rngs}
        self.head = Linear(last, num_classes, uniform=True, **linear)

    @staticmethod
    def count_blocks() -> int:
        """How many blocks there are."""
        return sum(stage[2] for stage in STAGES)

    def begin(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        return jax.nn.relu(self.bn(self.stem(x, context), context))

    def end(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = jax.nn.relu(self.last_bn(self.conv(x, context), context))
        return self.head(_pooled(x))

    def exit_head(
        self, channels: int, num_classes: int, *, place: int, halvings: int, **types: Any
    ) -> nnx.Module:
        """The head of an exit ``halvings`` of height and width before the last block."""
        blocks = max(halvings - 1, 0)
        return InvertedHead(channels, num_classes, blocks=blocks, ratio=self.ratio, **types)


class InvertedHead(nnx.Module):
    """Up to two inverted blocks of stride 2, their mean over height and width, a linear layer.

    Of two blocks, each is normalised once more, and the first rectified.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        blocks: int,
        ratio: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.blocks = blocks
        for i, planes in enumerate([int(ratio * wide) for wide in (32, 64)[:blocks]], 1):
            setattr(self, f"block{i}", InvertedBlock(channels, planes, 6, 2, **types))
            if blocks == 2:
                setattr(self, f"bn{i}", _norm(planes, types))
            channels = planes
        self.head = Linear(channels, num_classes, uniform=True, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        """Features -> logits float32 [B, classes]."""
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"block{i}")(x, context)
            if self.blocks == 2:
                x = getattr(self, f"bn{i}")(x, context)
                x = jax.nn.relu(x) if i == 1 else x
        return self.head(_pooled(x))


def _norm(channels: int, types: dict) -> BatchNorm:
    return BatchNorm(channels, param_dtype=types["param_dtype"])


def _pooled(x: Array) -> Array:
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
