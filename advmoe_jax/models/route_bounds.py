"""How far a router's scores can move within a box of images: interval bounds (IBP).

Every layer takes a box of features, given by its centre and its radius, to a box that holds all
that the layer can make of it (Gowal et al., 2018, arXiv 1810.12715, section 3). The last layer is
bounded for differences of scores, so that what moves two of them alike cancels. The bounds are
sound, up to float32's rounding, and exact for a linear router; for a deep one they are loose.
"""

from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import BatchNorm, Conv, conv2d
from advmoe_jax.models.router import LinearRouter, Router, RouterBlock
from advmoe_jax.types import Array


class Box(NamedTuple):
    """All features between ``centre - radius`` and ``centre + radius``."""

    centre: Array
    radius: Array

    @classmethod
    def between(cls, low: Array, high: Array) -> "Box":
        """The box of these corners."""
        return cls((low + high) / 2, (high - low) / 2)


def has_bounds(router: nnx.Module | None) -> bool:
    """Whether the scores of such a router can be bounded."""
    return isinstance(router, Router | LinearRouter)


def score_margins(
    router: nnx.Module, low: Array, high: Array
) -> Float[Array, "batch experts experts"]:
    """Lower bounds of score i minus score j over all images of a box; the diagonal is 0.

    The router is in inference mode.

    Args:
        router: of a whole network.
        low: normalised images, the least value of each pixel.
        high: the largest.

    Raises:
        UserError: if every layer has a router of its own, which sees features and not images, or
            the router is of a class that is not known here.
    """
    if not has_bounds(router):
        raise UserError(
            "routes are certified of one router that sees the image, a Router or a LinearRouter, "
            f"not of a {type(router).__name__}: set model.router.scope='global'"
        )
    corners = Box.between(low.astype(jnp.float32), high.astype(jnp.float32))
    kernel, bias = (x[...].astype(jnp.float32) for x in (router.head.kernel, router.head.bias))
    if isinstance(router, LinearRouter):
        kernel = router.kernel_of_pixels(low.shape[1:])  # one pixel is in several features
        features = Box(*(of.reshape(len(of), -1) for of in corners))
    else:
        features = _features(router, corners)
    return _differences(kernel, bias, features)


def are_certified(margins: Array, chosen: Array) -> Array:
    """Whether an image's experts are the same wherever in its box it lies.

    Args:
        margins: float32 [B, N, N], see ``score_margins``.
        chosen: int32 [B, k], the experts of the image itself, in any order.

    Returns:
        bool [B].
    """
    is_chosen = jnp.any(jax.nn.one_hot(chosen, margins.shape[-1], dtype=bool), axis=-2)
    matters = is_chosen[:, :, None] & ~is_chosen[:, None, :]
    return jnp.all((margins > 0) | ~matters, axis=(1, 2))


def _features(router: Router, x: Box) -> Box:
    x = Box(*map(router.shrunken, x))
    x = _relu(_normalised(router.bn, _convolved(router.stem, x)))
    for name in router.names:
        x = _block(getattr(router, name), x)
    return Box(*(jnp.mean(of, axis=(1, 2)) for of in x))


def _block(block: RouterBlock, x: Box) -> Box:
    y = _relu(_normalised(block.bn1, _convolved(block.conv1, x)))
    y = _normalised(block.bn2, _convolved(block.conv2, y))
    passed = Box(*map(block.shortcut, x))
    return _relu(Box(y.centre + passed.centre, y.radius + passed.radius))


def _convolved(layer: Conv, x: Box) -> Box:
    kernel = layer.kernel[...]
    arguments = (layer.stride, layer.padding, layer.precision)
    return Box(conv2d(x.centre, kernel, *arguments), conv2d(x.radius, jnp.abs(kernel), *arguments))


def _normalised(layer: BatchNorm, x: Box) -> Box:
    scale, shift = layer.affine(layer.mean[...], layer.var[...])
    return Box(x.centre * scale + shift, x.radius * jnp.abs(scale))


def _relu(x: Box) -> Box:
    return Box.between(jax.nn.relu(x.centre - x.radius), jax.nn.relu(x.centre + x.radius))


def _differences(kernel: Array, bias: Array, x: Box) -> Array:
    apart = kernel[:, :, None] - kernel[:, None, :]
    least = [
        jnp.einsum("bf,fij->bij", values, weights, precision=lax.Precision.HIGHEST)
        for values, weights in ((x.centre, apart), (x.radius, jnp.abs(apart)))
    ]
    return least[0] - least[1] + bias[:, None] - bias[None, :]
