"""Which images and which radius an attack can be meant for: what else is refused, in one line.

Every attack asks this first, before it computes anything. What nobody knows while a program is
compiled, the values of traced arrays, is not looked at.
"""

import math

import jax
import numpy as np

from advmoe_jax.attacks.constraints import AnyImages, Threat


def check_images(threat: Threat, images: AnyImages) -> None:
    """Raises ValueError for images, or an epsilon, that cannot be meant.

    Images must be floats in the threat's pixel range (so uint8 images, and floats from 0 to 255 in
    [0, 1], are refused), and the ball must not be so wide that it holds every image there is.
    """
    if not jax.dtypes.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"images are {images.dtype}: convert them to float32 in the pixel range, uint8 images "
            "by dividing by 255"
        )
    if not isinstance(threat.epsilon, jax.core.Tracer):
        _check_epsilon(threat, math.prod(images.shape[1:]))
    if _are_known(images):
        _check_range(threat, np.asarray(images))


def _check_epsilon(threat: Threat, pixels: int) -> None:
    if not np.all(np.asarray(threat.epsilon) > 0):
        raise ValueError(f"epsilon={threat.epsilon} must be positive")
    across = (threat.upper - threat.lower) * {"l2": math.sqrt(pixels), "l1": pixels}.get(
        threat.norm, 1
    )
    radius = np.asarray(threat.epsilon)
    # An infinite one is meant: the nearest image that is misclassified, wherever it is.
    if np.any(np.isfinite(radius) & (radius > across * (1 + 1e-6))):
        raise ValueError(
            f"epsilon={threat.epsilon} in {threat.norm} reaches every image of {pixels} values in "
            f"[{threat.lower:g}, {threat.upper:g}]: give it in units of the pixel range, such as "
            "8/255, or give the threat lower and upper"
        )


def _are_known(images: AnyImages) -> bool:
    """Whether there are values to look at, here."""
    return not isinstance(images, jax.core.Tracer) and getattr(images, "is_fully_addressable", True)


def _check_range(threat: Threat, images: np.ndarray) -> None:
    if not images.size:
        return
    low, high = float(images.min()), float(images.max())
    slack = 1e-6 * (threat.upper - threat.lower)
    if not (low >= threat.lower - slack and high <= threat.upper + slack):
        raise ValueError(
            f"pixels reach from {low:g} to {high:g}, outside the range "
            f"[{threat.lower:g}, {threat.upper:g}]: scale them, or give the threat lower and upper"
        )
