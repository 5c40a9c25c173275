"""A network as the functions that attacks take."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmoe_jax.attacks import Answer, Routed
from advmoe_jax.models.network import Network
from advmoe_jax.routing.choice import Routing, choose

Array = jax.Array
Tree = dict[str, Any]


def attacked(network: Network, params: Tree, stats: Tree) -> Callable[[Array], Array]:
    """Images -> logits in inference mode: ``Routed`` for a mixture of experts.

    Parameters and statistics are arguments of whatever is compiled from it, not constants in it.
    """
    if network.is_moe:
        return routed(network, params, stats)
    return Partial(_logits(network), params, stats)


def routed(network: Network, params: Tree, stats: Tree) -> Routed:
    """A mixture of experts as ``attacks.Routed``; routers per layer are decisions [B, L, ...].

    - ``classify`` is the network in inference mode, without the straight-through surrogate.
    - ``follow`` weighs the experts named as the gate would: ``straight_through`` by 1, ``softmax``
      by the router's probabilities of them at the images given.
    - ``mix`` weighs every expert of every layer.
    """
    *of_params, weigh = _functions(network)
    return Routed(*(Partial(function, params, stats) for function in of_params), Partial(weigh))


# One function per network, whatever its parameters: what is compiled from it serves them all.
@lru_cache(maxsize=16)
def _logits(network: Network) -> Callable[..., Array]:
    @jax.jit
    def logits(params: Tree, stats: Tree, images: Array) -> Array:
        return network.apply(params, stats, images)[0].logits

    return logits


@lru_cache(maxsize=16)
def _functions(network: Network) -> tuple[Callable[..., Any], ...]:
    """``Routed``'s; all but the last take parameters and statistics first."""
    # An attack always sees decisions; this network may leave out the axis of a single one.
    single = len(network.score_shape) == 1

    def lift(x: Array) -> Array:
        return x[:, None] if single else x

    def lower(x: Array) -> Array:
        return x[:, 0] if single else x

    @jax.jit
    def classify(params: Tree, stats: Tree, images: Array) -> Answer:
        output = network.apply(params, stats, images, surrogate=False)[0]
        return Answer(output.logits, lift(output.routing.scores), lift(output.routing.indices))

    def forced(params: Tree, stats: Tree, images: Array, routing: Routing) -> Array:
        return network.apply(params, stats, images, routing=routing)[0].logits

    @jax.jit
    def follow(params: Tree, stats: Tree, images: Array, indices: Array) -> Array:
        indices = lower(indices)
        if network.gate == "softmax":
            scores = network.route(params, stats, images)[0].scores
            weights = jnp.take_along_axis(jax.nn.softmax(scores), indices, axis=-1)
        else:
            scores = jnp.zeros((*indices.shape[:-1], network.num_experts))
            weights = jnp.ones(indices.shape)
        return forced(params, stats, images, Routing(indices, weights, scores))

    @jax.jit
    def mix(params: Tree, stats: Tree, images: Array, weights: Array) -> Array:
        weights = lower(weights)
        everyone = jnp.arange(network.num_experts, dtype=jnp.int32)
        indices = jnp.broadcast_to(everyone, weights.shape)
        return forced(params, stats, images, Routing(indices, weights, jnp.zeros_like(weights)))

    def weigh(scores: Array) -> Array:
        chosen = choose(scores, network.top_k, network.gate, surrogate=False)
        flags = jax.nn.one_hot(chosen.indices, network.num_experts)
        return jnp.sum(flags * chosen.weights[..., None], axis=-2)

    return classify, follow, mix, weigh
