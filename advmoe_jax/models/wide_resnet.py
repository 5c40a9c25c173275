"""Wide residual networks (Zagoruyko and Komodakis, 2016), dense and MoE by the same code.

In the MoE form every convolution of a block, the shortcut projections included, is one kernel per
expert; only the stem is shared. All widths, the stem's too, scale with ``ratio``.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.moe import conv_factory
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array


class PreActivationBlock(nnx.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice; a 1x1 projection where the width changes.

    Where it does, first convolution and projection read the same activation.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: of the first convolution and the projection.
        raw_widening: where the width changes, feed both the raw input rather than its normalised
            activation, as the published code of AdvMoE does in all but its dense CIFAR form.
        num_experts: kernels per convolution.
        dtype: of compute.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        raw_widening: bool,
        num_experts: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = conv_factory(num_experts)
        self.bn1 = BatchNorm(in_channels, param_dtype=param_dtype)
        self.conv1 = conv(in_channels, channels, 3, stride, 1, **types)
        self.bn2 = BatchNorm(channels, param_dtype=param_dtype)
        self.conv2 = conv(channels, channels, 3, 1, 1, **types)
        self.project = in_channels != channels
        if self.project:
            self.shortcut = conv(in_channels, channels, 1, stride, 0, **types)
        self.raw_widening = raw_widening and self.project

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C_in] -> [B, H / stride, W / stride, C_out]."""
        # The published form normalises too, for the running statistics, and drops the result.
        y = jax.nn.relu(self.bn1(x, context))
        if self.project and not self.raw_widening:
            x = y
        y = self.conv1(x if self.project else y, context)
        y = self.conv2(jax.nn.relu(self.bn2(y, context)), context)
        return y + (self.shortcut(x, context) if self.project else x)


class WideResNet(Trunk):
    """WRN-depth-factor with three stages.

    Args:
        depth: 6 n + 4, for n blocks per stage.
        factor: how much wider the stages are than the stem.
        imagenet: 7x7 stem of stride 2, normalised, with max pooling, instead of a plain 3x3.
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: kernels per convolution; 1 is the dense network.
        ratio: scales every width.
        width: channels of the stem at ratio 1 (published: 16).
        raw_widening: see ``PreActivationBlock``.
        dtype: of compute in the convolutions; logits are float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    first = "stem"  # the convolution that reads the image
    is_pre_activated = True

    def __init__(
        self,
        depth: int,
        factor: int,
        imagenet: bool = False,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int,
        ratio: float,
        width: int = 16,
        raw_widening: bool = False,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels = int(width * ratio)
        size, stride = (7, 2) if imagenet else (3, 1)
        self.stem = Conv(in_channels, channels, size, stride, size // 2, **types)
        self.imagenet = imagenet
        if imagenet:
            self.stem_bn = BatchNorm(channels, param_dtype=param_dtype)
        names = []
        for stage in range(3):
            for i in range((depth - 4) // 6):
                name = f"layer{stage + 1}_{i}"
                planes = int(width * factor * 2**stage * ratio)
                block = PreActivationBlock(
                    channels,
                    planes,
                    2 if stage > 0 and i == 0 else 1,
                    raw_widening=raw_widening,
                    num_experts=num_experts,
                    **types,
                )
                setattr(self, name, block)
                names.append(name)
                channels = planes
        self.names = tuple(names)
        self.bn = BatchNorm(channels, param_dtype=param_dtype)
        self.head = Linear(channels, num_classes, param_dtype=param_dtype, rngs=rngs)

    @staticmethod
    def count_blocks(depth: int, factor: int, imagenet: bool = False) -> int:
        """How many blocks a wide ResNet of that depth has."""
        return 3 * ((depth - 4) // 6)

    def begin(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = self.stem(x, context)
        if self.imagenet:
            x = jax.nn.relu(self.stem_bn(x, context))
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return x

    def end(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = jax.nn.relu(self.bn(x, context))
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
