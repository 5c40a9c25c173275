"""A network as the functions that attacks take, each of images alone.

A view takes (network, params, stats) and returns a function of images. Parameters and statistics
are arguments of whatever is compiled from it, not constants in it, and networks of one structure
share what was compiled. All views are in inference mode.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from advmoe_jax.attacks import Answer, Routed, through_gate
from advmoe_jax.attacks.exiting import Exiting, Seen
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import entropy, thresholds_of
from advmoe_jax.routing.choice import Routing, choose
from advmoe_jax.types import Array, Images, Tree

View = Callable[[Network, Tree, Tree], Callable[..., Any]]


def logits(network: Network, params: Tree, stats: Tree) -> Callable[[Images], Array]:
    """The network's own answer, with its true gradient: images -> logits."""
    return Partial(_logits, network, params, stats)


def straight_through(network: Network, params: Tree, stats: Tree) -> Callable[[Images], Array]:
    """Images -> logits, with the gradient that a straight-through gate pretends to have."""
    return Partial(_straight_through, network, params, stats)


def router_scores(network: Network, params: Tree, stats: Tree) -> Callable[[Images], Array]:
    """Images -> the router's scores [B, D, N], and nothing else."""
    return Partial(_router_scores, network, params, stats)


def with_importance(
    network: Network, params: Tree, stats: Tree
) -> Callable[[Images], tuple[Array, Array]]:
    """Images -> logits, and CV^2 of the importance of experts [B], added up over the layers.

    The importance is that of an image's own tokens, so that every image is attacked alone.
    """
    return Partial(_with_importance, network, params, stats)


def noisy_gate(network: Network, params: Tree, stats: Tree) -> Callable[[Images, Array], Array]:
    """(images, one key per image) -> logits along routes drawn by noise in the scores."""
    return through_gate(routed(network, params, stats), "hard")


def routed(network: Network, params: Tree, stats: Tree) -> Routed:
    """A mixture of experts for the attacks that know of routes.

    - ``classify`` is the network in inference mode, without the straight-through surrogate.
    - ``follow`` weighs the experts named as the gate would: ``straight_through`` by 1, a softmax
      by the router's probabilities of them where the images pass.
    - ``mix`` weighs every expert of every layer.
    """
    of_images = (
        Partial(function, network, params, stats) for function in (_classify, _follow, _mix)
    )
    return Routed(*of_images, Partial(_weigh, network))


def exits(network: Network, params: Tree, stats: Tree) -> Callable[[Images], tuple[Array, ...]]:
    """Images -> the logits of every exit, the main one last."""
    return Partial(_exits, network, params, stats)


def exiting(network: Network, params: Tree, stats: Tree) -> Exiting:
    """A network that images leave early, with the thresholds that are among its statistics."""
    return Exiting(Partial(_look, network, params, stats))


def whole(network: Network, params: Tree, stats: Tree) -> Callable[[Images], Array]:
    """What AutoAttack takes: the network as it answers, whatever it is.

    ``exiting`` for a network with side exits, ``routed`` for another mixture of experts, ``logits``
    for other networks.
    """
    if network.num_exits > 1:
        return exiting(network, params, stats)
    return (routed if network.is_moe else logits)(network, params, stats)


@jax.jit
def _logits(network: Network, params: Tree, stats: Tree, images: Images) -> Array:
    return network.apply(params, stats, images)[0].logits


@jax.jit
def _exits(network: Network, params: Tree, stats: Tree, images: Images) -> tuple[Array, ...]:
    return network.apply(params, stats, images)[0].exits


@jax.jit
def _look(network: Network, params: Tree, stats: Tree, images: Images) -> Seen:
    output = network.apply(params, stats, images, surrogate=False)[0]
    excess = entropy(jnp.stack(output.exits[:-1], axis=1)) - thresholds_of(stats)
    if output.routing is None:
        return Seen(output.exits, excess)
    return Seen(output.exits, excess, output.routing.scores, output.routing.indices)


@jax.jit
def _straight_through(network: Network, params: Tree, stats: Tree, images: Images) -> Array:
    return network.apply(params, stats, images, surrogate=True)[0].logits


@jax.jit
def _router_scores(network: Network, params: Tree, stats: Tree, images: Images) -> Array:
    return network.route(params, stats, images)[0].scores


@jax.jit
def _with_importance(
    network: Network, params: Tree, stats: Tree, images: Images
) -> tuple[Array, Array]:
    output = network.apply(params, stats, images, surrogate=False)[0]
    shares = jax.nn.softmax(output.routing.scores)
    shares = shares.reshape(len(shares), network.num_routers, -1, network.num_experts)
    importance = jnp.mean(shares, axis=2)
    variation = jnp.var(importance, axis=-1) / jnp.square(jnp.mean(importance, axis=-1))
    return output.logits, jnp.sum(variation, axis=-1)


@jax.jit
def _classify(network: Network, params: Tree, stats: Tree, images: Images) -> Answer:
    output = network.apply(params, stats, images, surrogate=False)[0]
    return Answer(output.logits, output.routing.scores, output.routing.indices)


@jax.jit
def _follow(network: Network, params: Tree, stats: Tree, images: Images, indices: Array) -> Array:
    return network.apply(params, stats, images, routing=Routing(indices))[0].logits


@jax.jit
def _mix(network: Network, params: Tree, stats: Tree, images: Images, weights: Array) -> Array:
    everyone = jnp.arange(network.num_experts, dtype=jnp.int32)
    indices = jnp.broadcast_to(everyone, weights.shape)
    routing = Routing(indices, weights, jnp.zeros_like(weights))
    return network.apply(params, stats, images, routing=routing)[0].logits


def _weigh(network: Network, scores: Array) -> Array:
    chosen = choose(scores, network.top_k, network.gate, surrogate=False)
    flags = jax.nn.one_hot(chosen.indices, network.num_experts)
    return jnp.sum(flags * chosen.weights[..., None], axis=-2)
