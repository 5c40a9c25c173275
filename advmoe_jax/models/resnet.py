"""ResNets (He et al., 2016) in their CIFAR and ImageNet forms, dense and MoE by the same code.

In the MoE form every convolution of a block is one kernel per expert; every BatchNorm and the stem
are shared. The shortcut projections are shared in the CIFAR form and experts in the ImageNet form.
"""

from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.moe import conv_factory
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array


class Stages(NamedTuple):
    """Residual blocks per stage, the kind of block, channels of the first stage as published.

    ``uniform_head``: the classifier is drawn as PyTorch does by default, see ``Linear``.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    width: int = 64
    uniform_head: bool = False


DEPTHS = {
    10: Stages((1, 1, 1, 1), bottleneck=False),
    18: Stages((2, 2, 2, 2), bottleneck=False),
    34: Stages((3, 4, 6, 3), bottleneck=False),
    # Of CIFAR alone, with three stages: section 4.2 of He et al., as RDI-Nets has it.
    38: Stages((6, 6, 6), bottleneck=False, width=16, uniform_head=True),
    50: Stages((3, 4, 6, 3), bottleneck=True),
    101: Stages((3, 4, 23, 3), bottleneck=True),
    152: Stages((3, 8, 36, 3), bottleneck=True),
}


class ResidualBlock(nnx.Module):
    """Basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 times 4) block, normalised after each layer."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        bottleneck: bool,
        shared_projection: bool = True,
        num_experts: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = conv_factory(num_experts)
        out_channels = channels * (4 if bottleneck else 1)
        if bottleneck:
            shapes = [(in_channels, channels, 1, 1), (channels, channels, 3, stride)]
            shapes.append((channels, out_channels, 1, 1))
        else:
            shapes = [(in_channels, channels, 3, stride), (channels, channels, 3, 1)]
        self.depth = len(shapes)
        for i, (inputs, outputs, size, step) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", conv(inputs, outputs, size, step, size // 2, **types))
            setattr(self, f"bn{i}", BatchNorm(outputs, param_dtype=param_dtype))
        self.project = stride != 1 or in_channels != out_channels
        if self.project:
            projection = Conv if shared_projection else conv
            self.shortcut_conv = projection(in_channels, out_channels, 1, stride, 0, **types)
            self.shortcut_bn = BatchNorm(out_channels, param_dtype=param_dtype)

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C_in] -> [B, H / stride, W / stride, C_out]."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"conv{i}")(y, context)
            y = getattr(self, f"bn{i}")(y, context)
            if i < self.depth:
                y = jax.nn.relu(y)
        if self.project:
            x = self.shortcut_bn(self.shortcut_conv(x, context), context)
        return jax.nn.relu(x + y)


class ResNet(Trunk):
    """ResNet of four stages (three in the CIFAR form of depth 38).

    Args:
        depth: one of ``DEPTHS``.
        imagenet: 7x7 stem of stride 2 with max pooling, instead of a 3x3.
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: kernels per convolution; 1 is the dense network.
        ratio: width of the blocks relative to the full network. It scales the stem too, but for
            the CIFAR form's MoE, whose shared stem stays whole.
        width: channels of the first stage at ratio 1; 0: as published.
        dtype: of compute in the convolutions; logits are float32.
        param_dtype: of the parameters.
    """

    first = "stem"  # the convolution that reads the image

    def __init__(
        self,
        depth: int,
        imagenet: bool = False,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int,
        ratio: float,
        width: int = 0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        stages = DEPTHS[depth]
        width = width or stages.width
        channels = int(width * ratio) if num_experts == 1 or imagenet else width
        size, stride = (7, 2) if imagenet else (3, 1)
        self.imagenet = imagenet
        self.stem = Conv(in_channels, channels, size, stride, size // 2, **types)
        self.bn = BatchNorm(channels, param_dtype=param_dtype)
        names = []
        for stage, blocks in enumerate(stages.blocks):
            for i in range(blocks):
                name = f"layer{stage + 1}_{i}"
                planes = int(width * 2**stage * ratio)
                block = ResidualBlock(
                    channels,
                    planes,
                    2 if stage > 0 and i == 0 else 1,
                    bottleneck=stages.bottleneck,
                    shared_projection=not imagenet,
                    num_experts=num_experts,
                    **types,
                )
                setattr(self, name, block)
                names.append(name)
                channels = planes * (4 if stages.bottleneck else 1)
        self.names = tuple(names)
        uniform = stages.uniform_head
        linear = {"uniform": uniform, "param_dtype": param_dtype, "rngs": rngs}
        self.head = Linear(channels, num_classes, **linear)

    @staticmethod
    def count_blocks(depth: int, imagenet: bool = False) -> int:
        """How many blocks a ResNet of that depth has."""
        return sum(DEPTHS[depth].blocks)

    def begin(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = jax.nn.relu(self.bn(self.stem(x, context), context))
        if self.imagenet:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x

    def end(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
