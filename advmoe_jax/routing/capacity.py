"""Experts with a limited number of places, as V-MoE has them: who finds none is dropped.

Nothing else in this package drops a choice. Here tokens of several images share an expert's places,
so that an image's output depends on its neighbours in the batch: the published behaviour (Riquelme
et al., 2021, section 2.4 and appendix C), which is an option and whose effect can be measured.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array

# The published code rounds places up to a multiple of this.
_MULTIPLE = 4


class Capacity(NamedTuple):
    """How many places experts have.

    Attributes:
        training: places over what an even load would need, in training; 0: none is dropped.
        evaluation: the same everywhere else; 0: an image's output is its own alone.
        images: how many images in a row share the places, a group; where the batch is no multiple
            of it, their greatest common divisor.
        batch_priority: within a group the choices of tokens with the largest weights are served
            first (Batch Prioritized Routing); otherwise those of the first tokens.
    """

    training: float = 0.0
    evaluation: float = 0.0
    images: int = 8
    batch_priority: bool = False


def places(choices: int, num_experts: int, ratio: float) -> int:
    """Places of each expert: ceil(ratio * choices / num_experts), rounded up to a multiple of 4.

    Args:
        choices: tokens times choices of a group.
        num_experts: that share them.
        ratio: 1 is just enough for an even load.
    """
    needed = math.ceil(choices * ratio / num_experts)
    return -(-needed // _MULTIPLE) * _MULTIPLE


def has_place(
    indices: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    num_experts: int,
    most: int,
    batch_priority: bool,
) -> Bool[Array, "tokens k"]:
    """Whether each choice of a group finds a place: all first choices before any second one.

    Args:
        indices: the experts chosen, best first.
        weights: of the choices.
        num_experts: to choose among.
        most: places of each expert.
        batch_priority: see ``Capacity``.
    """
    tokens, k = indices.shape
    order = jnp.argsort(-weights[:, 0]) if batch_priority else jnp.arange(tokens)
    queue = indices[order].T.reshape(-1)
    arrived = jnp.cumsum(queue[:, None] == jnp.arange(num_experts), axis=0)
    rank = jnp.take_along_axis(arrived, queue[:, None], axis=1)[:, 0] - 1
    served = (rank < most).reshape(k, tokens).T
    return served[jnp.argsort(order)]


def drop(routing: Routing, ratio: float, capacity: Capacity) -> Routing:
    """The routing of one layer with weight 0 for every choice that finds no place.

    Args:
        routing: of one layer, decisions are its tokens.
        ratio: ``capacity.training`` or ``capacity.evaluation``, positive.
        capacity: the groups, and who is served first.
    """
    batch, tokens, k = routing.indices.shape
    num_experts = routing.scores.shape[-1]
    group = math.gcd(batch, capacity.images) * tokens

    def of_group(indices: Array, weights: Array) -> Array:
        most = places(group * k, num_experts, ratio)
        return has_place(indices, weights, num_experts, most, capacity.batch_priority)

    grouped = (x.reshape(-1, group, k) for x in (routing.indices, routing.weights))
    kept = jax.vmap(of_group)(*grouped).reshape(batch, tokens, k)
    return routing._replace(weights=jnp.where(kept, routing.weights, 0.0))
