"""What goes into a network first, and what comes out of it."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.nnx as nnx
import jax.numpy as jnp
from jaxtyping import Float, Int

from advmoe_jax.errors import UserError
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Logits


class Output(NamedTuple):
    """What a network says of a batch.

    Attributes:
        logits: float32.
        routing: None for a network without a router.
        exits: float32, the logits of every exit of a multi-exit network, the main one last; None
            for other networks.
    """

    logits: Logits
    routing: Routing | None = None
    exits: tuple[Logits, ...] | None = None

    @property
    def answers(self) -> Float[Array, "batch *exits classes"]:
        """What is learned from: the logits, or those of every exit, each a decision of its own."""
        return self.logits if self.exits is None else jnp.stack(self.exits, axis=1)


def answer_of(logits: Float[Array, "*any classes"]) -> Int[Array, "*any"]:
    """The class of the largest logit, int32; -1, which is never right, where one is no number."""
    found = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, found)


class Normalize(nnx.Module):
    """(images - mean) / std per channel, so that attacks may live in pixel space [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] in [0, 1] -> the same shape, about zero mean and unit variance.

        Raises:
            UserError: if the images are integers, whose range nobody knows.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}: convert them to float32 in [0, 1], uint8 images by "
                "dividing by 255"
            )
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
