"""DenseNet-BC-40 (Huang et al., 2017), dense and MoE by the same code.

In the MoE form both convolutions of every dense layer are one kernel per expert; stem and
transitions are shared. All widths scale with ``ratio``.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.moe import conv_factory
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array

BLOCKS, LAYERS_PER_BLOCK = 3, 6  # depth 40: 3 blocks of 6 layers of 2 convolutions, and 4 more
BOTTLENECK, COMPRESSION = 4, 0.5


class DenseLayer(nnx.Module):
    """BatchNorm, ReLU, 1x1 to 4 k channels; BatchNorm, ReLU, 3x3 to k; appended to the input."""

    def __init__(
        self,
        in_channels: int,
        growth: int,
        *,
        num_experts: int,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = conv_factory(num_experts)
        self.bn1 = BatchNorm(in_channels, param_dtype=param_dtype)
        self.conv1 = conv(in_channels, BOTTLENECK * growth, 1, 1, 0, **types)
        self.bn2 = BatchNorm(BOTTLENECK * growth, param_dtype=param_dtype)
        self.conv2 = conv(BOTTLENECK * growth, growth, 3, 1, 1, **types)

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C] -> [B, H, W, C + growth]."""
        y = self.conv1(jax.nn.relu(self.bn1(x, context)), context)
        y = self.conv2(jax.nn.relu(self.bn2(y, context)), context)
        return jnp.concatenate([x, y], axis=-1)


class Transition(nnx.Module):
    """BatchNorm, ReLU, 1x1 convolution to half the channels, 2x2 average pool."""

    def __init__(
        self,
        in_channels: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.bn = BatchNorm(in_channels, param_dtype=param_dtype)
        self.out_channels = int(in_channels * COMPRESSION)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = Conv(in_channels, self.out_channels, 1, **types)

    def __call__(self, x: Array, context: Context) -> Array:
        """[B, H, W, C] -> [B, H / 2, W / 2, C / 2]."""
        x = self.conv(jax.nn.relu(self.bn(x, context)), context)
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class DenseNet(Trunk):
    """DenseNet-BC of depth 40. Its blocks are dense layers and transitions, in their order.

    Args:
        imagenet: 7x7 stem of stride 2, normalised, with max pooling, instead of a plain 3x3.
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: kernels per convolution; 1 is the dense network.
        ratio: scales stem and growth rate.
        width: channels of the stem at ratio 1, twice the growth rate (published: 24).
        dtype: of compute in the convolutions; logits are float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    first = "stem"  # the convolution that reads the image
    is_pre_activated = True

    def __init__(
        self,
        imagenet: bool = False,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int,
        ratio: float,
        width: int = 24,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels, growth = int(width * ratio), int(width // 2 * ratio)
        size, stride = (7, 2) if imagenet else (3, 1)
        self.stem = Conv(in_channels, channels, size, stride, size // 2, **types)
        self.imagenet = imagenet
        if imagenet:
            self.stem_bn = BatchNorm(channels, param_dtype=param_dtype)
        names = []
        for block in range(BLOCKS):
            for i in range(LAYERS_PER_BLOCK):
                names.append(f"layer{block + 1}_{i}")
                layer = DenseLayer(channels, growth, num_experts=num_experts, **types)
                setattr(self, names[-1], layer)
                channels += growth
            if block < BLOCKS - 1:
                names.append(f"transition{block + 1}")
                setattr(self, names[-1], Transition(channels, **types))
                channels = getattr(self, names[-1]).out_channels
        self.names = tuple(names)
        self.bn = BatchNorm(channels, param_dtype=param_dtype)
        self.head = Linear(channels, num_classes, param_dtype=param_dtype, rngs=rngs)

    @staticmethod
    def count_blocks(imagenet: bool = False) -> int:
        """How many dense layers and transitions there are."""
        return BLOCKS * LAYERS_PER_BLOCK + BLOCKS - 1

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
