"""A device's batch in parts, one after the other, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from advmoe_jax.attacks import Attack
from advmoe_jax.training.balance import Noise
from advmoe_jax.types import Array


def in_microbatches(attack: Attack, count: int) -> Callable[..., Array]:
    """The same attack on a function of images and noise, one part of the batch after the other.

    Args:
        attack: see ``attacks.Attack``.
        count: of parts.

    Returns:
        (function of images and noise, images, labels, keys, clean outputs, noise) -> images.
    """

    def whole(
        function: Callable[[Array, Noise | None], Any],
        images: Array,
        labels: Array | None,
        keys: Array,
        clean_outputs: Any,
        noise: Noise | None,
    ) -> Array:
        return attack(lambda x: function(x, noise), images, labels, keys, clean_outputs)

    def in_parts(
        function: Callable[[Array, Noise | None], Any], images: Array, *others: Any
    ) -> Array:
        parts = split((images, *others), count)
        adversarial = lax.map(lambda part: whole(function, *part), parts)
        return adversarial.reshape(images.shape)

    return whole if count == 1 else in_parts


def split(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...] of every array."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
