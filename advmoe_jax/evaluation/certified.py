"""How many routes no attack within the ball can change: proved by bounds, not tried by attacks."""

from functools import partial

import jax
import numpy as np

from advmoe_jax.attacks import Threat, box
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.pipeline import evaluation_batches
from advmoe_jax.data.sources import Split
from advmoe_jax.models import are_certified
from advmoe_jax.models.network import Network
from advmoe_jax.types import Array, Tree


def certified_agreement(
    network: Network, params: Tree, stats: Tree, split: Split, threat: Threat, batch_size: int
) -> float | None:
    """Share of the images whose experts are the same wherever in the threat's box they lie.

    A lower bound of the agreement under every attack, in linf and in every smaller ball; exact for
    a router that is linear in the pixels, loose for a deep one (see ``models.route_bounds``). With
    several experts for an image it is of the set of them, the agreement of the first alone.

    Args:
        network: the functional network.
        params: its parameters.
        stats: its BatchNorm statistics.
        split: the images, uint8.
        threat: the ball.
        batch_size: images at a time.

    Returns:
        A share of 1; None without a router that sees the image itself.
    """
    if not network.has_route_bounds:
        return None
    count = 0
    size = min(batch_size, len(split.labels))
    for indices, valid in evaluation_batches(len(split.labels), size):
        batch = np.asarray(split.images[indices])  # the same in every process
        certain = _are_certified(network, params, stats, batch, threat=threat)
        count += int(np.sum(np.asarray(certain)[:valid]))
    return count / len(split.labels)


@partial(jax.jit, static_argnames="threat")
def _are_certified(
    network: Network, params: Tree, stats: Tree, images: Array, *, threat: Threat
) -> Array:
    images = to_float(images)
    margins = network.route_margins(params, stats, *box(threat, images))
    chosen = network.route(params, stats, images)[0].indices
    return are_certified(margins, chosen[:, 0])
