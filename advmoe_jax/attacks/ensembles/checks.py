"""What can be wrong with the input of an attack, said before any of it is computed.

These look at values, so they run outside ``jit``; the ensembles call them, and ``check`` does
for whoever uses another attack.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from advmoe_jax.attacks.admissible import check_images
from advmoe_jax.attacks.constraints import AnyImages, Threat
from advmoe_jax.types import Labels, Logits


def check(
    threat: Threat,
    function: Callable[[AnyImages], Logits],
    images: AnyImages,
    labels: Labels,
) -> list[str]:
    """Checks images, labels and the function's outputs on them.

    Args:
        threat: the threat model.
        function: images -> logits.
        images: in the pixel range.
        labels: of the images.

    Returns:
        Warnings, a sentence each.

    Raises:
        ValueError: if an attack would make no sense: one line, what is wrong and what to do.
    """
    check_input(threat, images, labels)
    return check_logits(np.asarray(function(images)), labels)


def check_input(threat: Threat, images: AnyImages, labels: Labels) -> None:
    """Raises ValueError for an epsilon, images or labels that make no sense."""
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"images {images.shape} and labels {labels.shape} do not match: "
            "give at least one image and a label for each"
        )
    check_images(threat, images)
    if not jax.dtypes.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}: give integers, one class per image")


def check_logits(logits: Float[np.ndarray, "batch classes"], labels: Labels) -> list[str]:
    """Warnings about the outputs on the clean images.

    Raises:
        ValueError: outputs are not [B, K], not numbers, or a label is no class.
    """
    labels = np.asarray(labels)
    if logits.ndim != 2 or logits.shape[0] != len(labels) or logits.shape[1] < 2:
        raise ValueError(
            f"the function returns {logits.shape} for {len(labels)} images: "
            f"it must return logits [{len(labels)}, classes]"
        )
    bad = int(np.sum(np.any(np.isnan(logits.astype(np.float32)), axis=1)))
    if bad:
        raise ValueError(
            f"the logits of {bad} of {len(labels)} images are not a number: mend the function"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}, but the function has "
            f"{logits.shape[1]} classes, 0 to {logits.shape[1] - 1}"
        )
    sums = np.sum(logits.astype(np.float64), axis=1)
    if logits.min() >= -1e-5 and logits.max() <= 1 + 1e-5 and np.all(np.abs(sums - 1) < 1e-3):
        return [
            "the function seems to return probabilities: give logits, "
            "for the softmax hides gradients from the attacks"
        ]
    return []


def check_deterministic(
    first: Float[np.ndarray, "batch classes"], second: Float[np.ndarray, "batch classes"]
) -> list[str]:
    """A warning if two outputs on the same images differ by more than rounding."""

    def normal(logits: np.ndarray) -> np.ndarray:
        # A class that cannot be is -inf, each time alike; it would make all others nothing.
        logits = np.nan_to_num(logits.astype(np.float64), posinf=1e3, neginf=-1e3)
        return logits / (np.linalg.norm(logits, axis=-1, keepdims=True) + 1e-10)

    if np.max(np.linalg.norm(normal(first) - normal(second), axis=-1)) <= 1e-4:
        return []
    return [
        "the function is randomised: two calls on the same images differ; "
        'let it take keys, function(images, keys), and use version="rand"'
    ]
