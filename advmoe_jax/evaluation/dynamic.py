"""Inference that stops at the exit an image leaves at, and is faster for it.

Images that have left are packed away: each stage runs over blocks of the images that are still in,
so that its time follows from their number. Shapes are static; the number of blocks is not.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Int

from advmoe_jax.models.network import Network
from advmoe_jax.models.output import answer_of
from advmoe_jax.models.trunk import entropy, thresholds_of
from advmoe_jax.types import Array, Images, Labels, Tree

BLOCK = 32


class Left(NamedTuple):
    """What is said of images, and the exit, from 0, that each left at."""

    predictions: Labels
    exits: Int[Array, " batch"]


class _Still(NamedTuple):
    """Images that are still in: the first ``count`` of ``image``, their numbers.

    ``at`` is where each one's features are in ``features``.
    """

    image: Int[Array, " batch"]
    at: Int[Array, " batch"]
    count: Int[Array, ""]
    features: Array


def classify(
    network: Network, params: Tree, stats: Tree, images: Images, block: int = BLOCK
) -> Left:
    """The predictions of the dynamic network; runs inside jit.

    Args:
        network: with side exits, whose thresholds are among the statistics.
        params: parameters.
        stats: statistics.
        images: the batch.
        block: images that go through a stage at once.

    Raises:
        UserError: if every layer of a mixture is routed by itself.
    """
    total = len(images)
    padded = -(-total // block) * block
    images = jnp.pad(images, ((0, padded - total), *((0, 0),) * (images.ndim - 1)))
    routing = network.route(params, stats, images)[0] if network.is_moe else None
    thresholds = thresholds_of(stats)
    numbers = jnp.arange(padded, dtype=jnp.int32)
    still = _Still(numbers, numbers, jnp.asarray(total, jnp.int32), images)
    left = Left(jnp.zeros(padded, jnp.int32), jnp.zeros(padded, jnp.int32))
    for number in range(network.num_exits):
        features, logits = _stage(network, params, stats, number, still, routing, block)
        inside = numbers < still.count
        leaves = inside
        if number < network.num_exits - 1:
            leaves = inside & (entropy(logits) < thresholds[number])
        # Numbers outside of the array are not written.
        gone = jnp.where(leaves, still.image, padded)
        said = answer_of(logits)
        left = Left(
            left.predictions.at[gone].set(said, mode="drop"),
            left.exits.at[gone].set(number, mode="drop"),
        )
        stays = inside & ~leaves
        order = jnp.argsort(~stays, stable=True).astype(jnp.int32)
        still = _Still(still.image[order], order, jnp.sum(stays, dtype=jnp.int32), features)
    return jax.tree.map(lambda x: x[:total], left)


def _stage(
    network: Network,
    params: Tree,
    stats: Tree,
    number: int,
    still: _Still,
    routing: Any,
    block: int,
) -> tuple[Array, Array]:
    """Features and logits of the images that are still in, in the order of ``still``."""

    def of_block(i: Array) -> tuple[Array, Array]:
        rows = lax.dynamic_slice_in_dim(still.at, i * block, block)
        x = still.features[rows]
        if routing is None:
            return network.stage(params, stats, number, x)
        own = lax.dynamic_slice_in_dim(still.image, i * block, block)
        routes = jax.tree.map(lambda part: part[own], routing)
        return network.stage(params, stats, number, x, routing=routes)

    def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(
            lambda all_rows, rows: lax.dynamic_update_slice_in_dim(all_rows, rows, i * block, 0),
            found,
            of_block(i),
        )

    shapes = jax.eval_shape(of_block, jnp.int32(0))
    size = len(still.image)
    empty = jax.tree.map(lambda s: jnp.zeros((size, *s.shape[1:]), s.dtype), shapes)
    blocks = -(-still.count // block)
    return lax.fori_loop(0, blocks, step, empty)
