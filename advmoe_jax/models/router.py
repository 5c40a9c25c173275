"""The router: images -> scores of the experts; and what is chosen from the scores."""

from functools import partial
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear

Array = jax.Array
GATES = ("straight_through", "softmax")


class Routing(NamedTuple):
    """What was chosen for every image.

    Attributes:
        indices: int32 [B, k], the chosen experts, best first.
        weights: float32 [B, k], what the output of each is multiplied by.
        scores: float32 [B, N], the router's scores of all experts (before any softmax).
    """

    indices: Array
    weights: Array
    scores: Array


def choose(
    scores: Array, top_k: int = 1, gate: str = "straight_through", surrogate: bool = True
) -> Routing:
    """Top-k of the scores, and the weights of the chosen.

    Args:
        scores: [B, N]; computed with in float32.
        top_k: experts per image, 1 <= top_k <= N.
        gate: ``straight_through``: weight 1 forward, and backward the gradient of the weight goes
            to the chosen expert's score unchanged; ``softmax``: the probabilities of the chosen.
        surrogate: whether ``straight_through`` has that backward pass; without it the weight has
            its true derivative, zero.

    Raises:
        UserError: if ``top_k`` or ``gate`` is not valid.
    """
    num_experts = scores.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise UserError(f"model.top_k={top_k} must lie between 1 and num_experts={num_experts}")
    if gate not in GATES:
        raise UserError(f"model.gate={gate!r} is unknown; choose one of {', '.join(GATES)}")
    scores = scores.astype(jnp.float32)
    indices = lax.top_k(scores, top_k)[1]
    if gate == "softmax":
        weights = jnp.take_along_axis(jax.nn.softmax(scores), indices, axis=-1)
    elif surrogate:
        chosen = jnp.take_along_axis(scores, indices, axis=-1)
        weights = 1.0 + (chosen - lax.stop_gradient(chosen))
    else:
        weights = jnp.ones(indices.shape, jnp.float32)
    return Routing(indices.astype(jnp.int32), weights, scores)


# Accelerators would round float32 products to fewer bits; a route must not hang on that.
_conv3x3 = partial(Conv, size=3, padding=1, precision=lax.Precision.HIGHEST)


class _Block(nnx.Module):
    """Two 3x3 convolutions around an identity shortcut padded with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv3x3(in_channels, channels, stride=stride, rngs=rngs)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _conv3x3(channels, channels, rngs=rngs)
        self.bn2 = BatchNorm(channels)
        self.stride = stride

    def __call__(self, x: Array, context: Context) -> Array:
        y = jax.nn.relu(self.bn1(self.conv1(x, context), context))
        y = self.bn2(self.conv2(y, context), context)
        extra = y.shape[-1] - x.shape[-1]
        shortcut = x[:, :: self.stride, :: self.stride]
        shortcut = jnp.pad(shortcut, ((0, 0),) * 3 + ((extra // 2, extra - extra // 2),))
        return jax.nn.relu(y + shortcut)


class Router(nnx.Module):
    """A small CIFAR ResNet (He et al., 2016) with one score per expert; float32 throughout.

    The published router is ``width`` 16 and ``blocks`` 3: ResNet-20.

    Args:
        in_channels: channels of the images.
        num_experts: number of scores.
        width: channels of the stem and first stage; the next two stages have 2 and 4 times as many.
        blocks: residual blocks per stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        width: int = 16,
        blocks: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        self.stem = _conv3x3(in_channels, width, rngs=rngs)
        self.bn = BatchNorm(width)
        names = []
        channels = width
        for stage in range(3):
            for i in range(blocks):
                name = f"layer{stage + 1}_{i}"
                stride = 2 if stage > 0 and i == 0 else 1
                setattr(self, name, _Block(channels, width << stage, stride, rngs=rngs))
                names.append(name)
                channels = width << stage
        self.names = tuple(names)
        self.head = Linear(channels, num_experts, rngs=rngs)

    def __call__(self, images: Array, context: Context) -> Array:
        """Normalised images [B, H, W, C] -> scores float32 [B, N]."""
        x = images.astype(jnp.float32)
        x = jax.nn.relu(self.bn(self.stem(x, context), context))
        for name in self.names:
            x = getattr(self, name)(x, context)
        return self.head(jnp.mean(x, axis=(1, 2)))
