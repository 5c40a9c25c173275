"""Routers: images, or a layer's input -> scores of the experts; and what is chosen from them.

Two scopes: ``global``, one decision per image that all MoE layers follow (the published code), and
``per_layer``, a small router in front of every MoE layer (the paper's description). A global router
is a small ResNet, as published, or linear in the pixels.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array

SCOPES = ("global", "per_layer")


class Size(NamedTuple):
    """How large a global router is, see ``Router``."""

    resolution: int
    width: int
    blocks: int


# The published router is made for ResNets at 32x32: at 224x224 it costs more than a dense
# ResNet-18, at 32x32 twice the pathway of a DenseNet-40. The others are the same on fewer pixels.
PRESETS = {
    "published": Size(resolution=0, width=16, blocks=3),
    "at_32": Size(resolution=32, width=16, blocks=3),
    "at_16": Size(resolution=16, width=16, blocks=3),
    "at_8": Size(resolution=8, width=16, blocks=3),
    "narrow_at_8": Size(resolution=8, width=8, blocks=3),
}


# Accelerators would round float32 products to fewer bits; a route must not hang on that.
_conv3x3 = partial(Conv, size=3, padding=1, precision=lax.Precision.HIGHEST)


class RouterBlock(nnx.Module):
    """Two 3x3 convolutions around an identity shortcut padded with zero channels."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv3x3(in_channels, channels, stride=stride, rngs=rngs)
        self.bn1 = BatchNorm(channels)
        self.conv2 = _conv3x3(channels, channels, rngs=rngs)
        self.bn2 = BatchNorm(channels)
        self.stride = stride

    def __call__(self, x: Array, context: Context) -> Array:
        """Features [B, H, W, C] -> the same with the block's channels and stride."""
        y = jax.nn.relu(self.bn1(self.conv1(x, context), context))
        y = self.bn2(self.conv2(y, context), context)
        return jax.nn.relu(y + self.shortcut(x))

    def shortcut(self, x: Array) -> Array:
        """What is added to the convolutions' output: every pixel that the stride leaves."""
        extra = self.conv2.kernel.shape[-1] - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0),) * 3 + ((extra // 2, extra - extra // 2),))


class Router(nnx.Module):
    """A small CIFAR ResNet (He et al., 2016) with one score per expert; float32 throughout.

    The published router is ``width`` 16 and ``blocks`` 3, at the images' resolution: ResNet-20.

    Args:
        in_channels: channels of the images.
        num_experts: number of scores.
        resolution: images with a longer side are shrunk to ``resolution`` x ``resolution`` pixels
            first; 0: never.
        width: channels of the stem and first stage; the next two stages have 2 and 4 times as many.
        blocks: residual blocks per stage.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        resolution: int = 0,
        width: int = 16,
        blocks: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        self.resolution = resolution
        self.stem = _conv3x3(in_channels, width, rngs=rngs)
        self.bn = BatchNorm(width)
        names = []
        channels = width
        for stage in range(3):
            for i in range(blocks):
                name = f"layer{stage + 1}_{i}"
                stride = 2 if stage > 0 and i == 0 else 1
                setattr(self, name, RouterBlock(channels, width << stage, stride, rngs=rngs))
                names.append(name)
                channels = width << stage
        self.names = tuple(names)
        self.head = Linear(channels, num_experts, rngs=rngs)

    def __call__(self, images: Array, context: Context) -> Array:
        """Normalised images [B, H, W, C] -> scores float32 [B, N]."""
        x = self.shrunken(images.astype(jnp.float32))
        x = jax.nn.relu(self.bn(self.stem(x, context), context))
        for name in self.names:
            x = getattr(self, name)(x, context)
        return self.head(jnp.mean(x, axis=(1, 2)))

    def shrunken(self, x: Array) -> Array:
        """The images that the stem sees, each pixel an average of pixels."""
        is_large = self.resolution and max(x.shape[1:3]) > self.resolution
        return _shrink(x, self.resolution) if is_large else x


class LinearRouter(nnx.Module):
    """Scores that are linear in the pixels of the shrunken image; float32 throughout.

    How far a perturbation moves such a score is known exactly (``route_bounds``), and it costs next
    to nothing: what it leaves of a budget goes to the experts.

    Args:
        in_channels: channels of the images.
        num_experts: number of scores.
        resolution: every image is brought to ``resolution`` x ``resolution`` pixels.
    """

    def __init__(
        self, in_channels: int, num_experts: int, *, resolution: int, rngs: nnx.Rngs
    ) -> None:
        self.resolution = resolution
        self.head = Linear(resolution**2 * in_channels, num_experts, rngs=rngs)

    def features(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> float32 [B, pixels], each an average of pixels."""
        shrunken = _shrink(images.astype(jnp.float32), self.resolution)
        return shrunken.reshape(len(images), -1)

    def kernel_of_pixels(self, shape: tuple[int, int, int]) -> Array:
        """What every pixel of images of that shape weighs in every score, float32 [pixels, N]."""
        transposed = jax.linear_transpose(self.features, jnp.zeros((1, *shape)))
        of_scores = jax.vmap(lambda column: transposed(column[None])[0])(self.head.kernel[...].T)
        return of_scores.reshape(len(of_scores), -1).T

    def __call__(self, images: Array, context: Context) -> Array:
        """Normalised images [B, H, W, C] -> scores float32 [B, N]."""
        return self.head(self.features(images))


def _shrink(images: Array, size: int) -> Array:
    """[B, H, W, C] -> [B, size, size, C]: means of tiles, or a linear filter if they do not fit.

    Every pixel is an average of pixels: none of the weights is negative.
    """
    batch, height, width, channels = images.shape
    if height % size == width % size == 0:
        tiles = images.reshape(batch, size, height // size, size, width // size, channels)
        return jnp.mean(tiles, axis=(2, 4))
    shape = (batch, size, size, channels)
    return jax.image.resize(images, shape, "linear", precision=lax.Precision.HIGHEST)


class LayerRouter(nnx.Module):
    """Scores the experts of one MoE layer from the mean of its input; float32 throughout.

    Means over height and width, normalised over the batch (means of rectified features differ
    little between images), then two linear layers.

    Args:
        in_channels: channels of the layer's input.
        num_experts: number of scores.
        width: hidden units.
    """

    def __init__(self, in_channels: int, num_experts: int, *, width: int, rngs: nnx.Rngs) -> None:
        self.bn = BatchNorm(in_channels)
        self.hidden = Linear(in_channels, width, rngs=rngs)
        self.head = Linear(width, num_experts, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        """Features [B, H, W, C] -> scores float32 [B, N]."""
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
        return self.head(jax.nn.relu(self.hidden(self.bn(pooled, context)[:, 0, 0])))


class LayerRouters(nnx.Module):
    """A router for each MoE layer of a backbone.

    Args:
        in_channels: by name of the layer, in their order, the size of its input's last axis.
        num_experts: number of scores.
        router: class of the routers.
        **settings: of each router.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        num_experts: int,
        *,
        router: type[nnx.Module] = LayerRouter,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        self.names = tuple(in_channels)
        for name, channels in in_channels.items():
            setattr(self, name, router(channels, num_experts, rngs=rngs, **settings))

    def __call__(self, number: int, x: Array, context: Context) -> Array:
        """Input of the MoE layer of that number -> scores float32, [B, N] or [B, tokens, N]."""
        return getattr(self, self.names[number])(x, context)


class LayerRoutes:
    """The routes of one pass, made or followed layer by layer.

    Args:
        routers: of the layers.
        context: the routers' own.
        decide: (scores, noise or None, indices to take or None) -> routing of one layer.
        routing: what to follow, or its indices alone; None: what is decided.
        noise: on all scores [B, D, N], or None.
    """

    def __init__(
        self,
        routers: LayerRouters,
        context: Context,
        decide: Callable[[Array, Array | None, Array | None], Routing],
        routing: Routing | None,
        noise: Array | None,
    ) -> None:
        self._routers, self._context, self._decide = routers, context, decide
        self._routing, self._noise = routing, noise
        self._taken: dict[int, Routing] = {}

    def follow(self, number: int, x: Array) -> Routing:
        """The routing of the layer of that number, with that input."""
        here, noise = (self._of_layer(tree, number) for tree in (self._routing, self._noise))
        if here is None or here.weights is None:
            scores = self._routers(number, x, self._context)
            scores = scores.reshape(len(x), -1, scores.shape[-1])
            here = self._decide(scores, noise, None if here is None else here.indices)
        self._taken[number] = here
        return here

    @property
    def taken(self) -> Routing:
        """The routing of all layers, once all have been passed."""
        if self._routing is not None and self._routing.weights is not None:
            return self._routing
        parts = zip(*(self._taken[number] for number in sorted(self._taken)), strict=True)
        return Routing(*(jnp.concatenate(part, axis=1) for part in parts))

    def _of_layer(self, tree: Any, number: int) -> Any:
        """The share of one layer in arrays [B, D, ...]."""

        def part(x: Array) -> Array:
            decisions = x.shape[1] // len(self._routers.names)
            return x[:, number * decisions : (number + 1) * decisions]

        return jax.tree.map(part, tree)
