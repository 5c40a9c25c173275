"""Which images, labels and radius an attack can be meant for: all else is refused, in one line.

Every attack asks this first, before it computes anything. What nobody knows while a program is
compiled, the values of traced arrays, is not looked at.
"""

import math
from typing import Any

import jax
import numpy as np

from advmoe_jax.attacks.constraints import NORMS, AnyImages, Threat, diameter


def check_images(threat: Threat, images: AnyImages, *, is_boundless: bool = False) -> None:
    """Raises ValueError for images, or a threat, that cannot be meant.

    Images must be floats in the threat's pixel range (so uint8 images, and floats from 0 to 255 in
    [0, 1], are refused), the norm one of ``NORMS``, and the ball not so wide that it holds every
    image there is; an infinite one is meant for an attack that ``is_boundless``: it looks for the
    nearest image that is misclassified, wherever that is.
    """
    if threat.norm not in NORMS:
        raise ValueError(f"norm {threat.norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if not images.size:
        raise ValueError(f"images are {images.shape}: give at least one")
    if not jax.dtypes.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images are {images.dtype}: convert them to float32 in the pixel range, uint8 images "
            "by dividing by 255"
        )
    if not isinstance(threat.epsilon, jax.core.Tracer):
        _check_epsilon(threat, images.shape[1:], is_boundless)
    if _are_known(images):
        _check_range(threat, np.asarray(images))


def check_labels(images: AnyImages, labels: Any) -> None:
    """Raises ValueError unless there is a class for each image, or a distribution over classes.

    Only types and shapes are looked at, so that traced labels are checked, too.
    """
    if not hasattr(labels, "ndim"):
        told = "None" if labels is None else f"a {type(labels).__name__}"
        raise ValueError(f"labels are {told}: give an array of integers, one for each image")
    if labels.ndim == 0 or labels.shape[0] != images.shape[0]:
        raise ValueError(
            f"images {images.shape} and labels {labels.shape} do not match: give one label for "
            "each image"
        )
    if labels.ndim == 1 and jax.dtypes.issubdtype(labels.dtype, np.floating):
        raise ValueError(
            f"labels are {labels.dtype}: give integers, or distributions [batch, classes]"
        )


def _check_epsilon(threat: Threat, shape: tuple[int, ...], is_boundless: bool) -> None:
    if not np.all(np.asarray(threat.epsilon) > 0):
        raise ValueError(f"epsilon={threat.epsilon} must be positive")
    radius = np.asarray(threat.epsilon)
    is_meant = np.isinf(radius) & is_boundless
    if np.any(~is_meant & (radius > diameter(threat, shape) * (1 + 1e-6))):
        raise ValueError(
            f"epsilon={threat.epsilon} in {threat.norm} reaches every image of {math.prod(shape)} "
            f"values in [{threat.lower:g}, {threat.upper:g}]: give it in units of the pixel range, "
            "such as 8/255, or give the threat lower and upper"
        )


def _are_known(images: AnyImages) -> bool:
    """Whether there are values to look at, here."""
    return not isinstance(images, jax.core.Tracer) and getattr(images, "is_fully_addressable", True)


def _check_range(threat: Threat, images: np.ndarray) -> None:
    low, high = float(images.min()), float(images.max())
    slack = 1e-6 * (threat.upper - threat.lower)
    if not (low >= threat.lower - slack and high <= threat.upper + slack):
        raise ValueError(
            f"pixels reach from {low:g} to {high:g}, outside the range "
            f"[{threat.lower:g}, {threat.upper:g}]: scale them, or give the threat lower and upper"
        )
