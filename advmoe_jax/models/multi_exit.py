"""Side exits for any backbone: where they are, and what heads they have.

The rule for heads is that of RDI-Nets for its ResNet-38 (Hu et al., ICLR 2020, published code),
said so that it fits every backbone. It depends on how often height and width are still halved
between the exit and the last block:

- twice or more: 2x2 max pool, 5x5 convolution to 4 times the channels, BatchNorm, ReLU, 2x2 max
  pool, 3x3 convolution to 2 times the channels, BatchNorm, mean, linear;
- once: 2x2 max pool, a basic residual block, mean, linear;
- never: mean over height and width, linear.

Backbones that are normalised and rectified at the beginning of a block (WideResNet, DenseNet) have
a BatchNorm and a ReLU in front. SmallCNN and MobileNetV2 have heads of their own.
"""

import math

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.errors import UserError
from advmoe_jax.models.dense_layers import max_pool
from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.resnet import ResidualBlock
from advmoe_jax.models.trunk import Exits, Trunk
from advmoe_jax.types import Array

_NOMINAL = 64  # height and width of the images that shapes are traced with


class Head(nnx.Module):
    """The head of an exit, by the rule above.

    Args:
        channels: of the features.
        num_classes: number of logits.
        halvings: of height and width between the exit and the last block.
        is_pre_activated: whether the features are neither normalised nor rectified.
        dtype: of compute in the convolutions; logits are float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        halvings: int,
        is_pre_activated: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.halvings, self.is_pre_activated = min(halvings, 2), is_pre_activated
        if is_pre_activated:
            self.bn = BatchNorm(channels, param_dtype=param_dtype)
        if self.halvings == 2:
            wide = 4 * channels
            self.conv1 = Conv(channels, wide, 5, 1, 2, **types)
            self.bn1 = BatchNorm(wide, param_dtype=param_dtype)
            channels = 2 * channels
            self.conv2 = Conv(wide, channels, 3, 1, 1, **types)
            self.bn2 = BatchNorm(channels, param_dtype=param_dtype)
        elif self.halvings == 1:
            settings = {"bottleneck": False, "num_experts": 1}
            self.block = ResidualBlock(channels, channels, 1, **settings, **types)
        self.head = Linear(channels, num_classes, uniform=True, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        """Features -> logits float32 [B, classes]."""
        if self.is_pre_activated:
            x = jax.nn.relu(self.bn(x, context))
        if self.halvings:
            x = _halved(x)
        if self.halvings == 2:
            x = jax.nn.relu(self.bn1(self.conv1(x, context), context))
            x = self.bn2(self.conv2(_halved(x), context), context)
        elif self.halvings == 1:
            x = self.block(x, context)
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))


def _halved(x: Array) -> Array:
    """A 2x2 max pool, of what is large enough for one."""
    return max_pool(x) if min(x.shape[1:3]) > 1 else x


def check_places(name: str, places: tuple[int, ...], trunk: type[Trunk], num_blocks: int) -> None:
    """Raises UserError, in one line, unless exits can be behind these blocks.

    Args:
        name: of the backbone.
        places: numbers of blocks, from 1.
        trunk: the backbone's class.
        num_blocks: how many blocks it has.
    """
    told = f"model.exits={tuple(places)}"
    if any(not isinstance(place, int) or isinstance(place, bool) for place in places):
        raise UserError(f"{told} must be numbers of blocks, such as (2, 4, 6)")
    if list(places) != sorted(set(places)):
        raise UserError(f"{told} must ascend, each block once")
    if places and not (places[0] >= 1 and places[-1] < num_blocks):
        raise UserError(
            f"{told}: {name} has {num_blocks} blocks; a side exit stands behind one of the blocks "
            f"1 to {num_blocks - 1}"
        )
    possible = getattr(trunk, "exit_places", places)
    if wrong := [place for place in places if place not in possible]:
        raise UserError(
            f"{told}: {name} has no exit behind block {wrong[0]}; choose from {possible}"
        )


def attach_exits(
    trunk: Trunk,
    places: tuple[int, ...],
    *,
    in_channels: int,
    num_classes: int,
    image_size: int = _NOMINAL,
    **types: object,
) -> None:
    """Gives a backbone side exits behind the blocks ``places``, counted from 1.

    Args:
        trunk: gets an attribute ``exits``.
        places: checked by ``check_places``.
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width to look at the shapes of features with.
        **types: ``dtype``, ``param_dtype``, ``rngs``, of the heads.
    """
    shapes = _shapes(trunk, in_channels, getattr(trunk, "image_size", image_size))
    heads = []
    for place in places:
        channels = shapes[place - 1][-1]
        halvings = round(math.log2(shapes[place - 1][1] / shapes[-1][1]))
        if own := getattr(trunk, "exit_head", None):
            head = own(channels, num_classes, place=place, halvings=halvings, **types)
        else:
            kind = {"halvings": halvings, "is_pre_activated": trunk.is_pre_activated}
            head = Head(channels, num_classes, **kind, **types)
        heads.append(head)
    trunk.exits = Exits(places, heads)


def _shapes(trunk: Trunk, in_channels: int, size: int) -> list[tuple[int, ...]]:
    """Of the features behind each block, of one image that one expert sees."""
    context = Context(expert=jnp.zeros((), jnp.int32))

    def features(image: Array) -> list[Array]:
        found, x = [], trunk.begin(image, context)
        for number in range(trunk.num_blocks):
            x = trunk.block(number, x, context)
            found.append(x)
        return found

    image = jax.ShapeDtypeStruct((1, size, size, in_channels), jnp.float32)
    return [x.shape for x in jax.eval_shape(features, image)]
