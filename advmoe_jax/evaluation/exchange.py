"""What a mixture answers if its experts are exchanged at test time.

An exchange makes of every decision another one, where it is made: layers behind see what comes of
it. Where other experts stand in for the chosen ones (``next_best``, ``random``), they take over
these ones' weights, so that the experts alone are exchanged; where fewer or others are allowed
(``without``, ``top_k``), the gate weighs what is left.
"""

from collections.abc import Callable
from itertools import count

import jax
import jax.numpy as jnp

from advmoe_jax.models.network import Network
from advmoe_jax.routing.choice import Routing, choose
from advmoe_jax.types import Array, Images, Labels, Tree

Exchange = Callable[[Routing], Routing]


def next_best(routing: Routing) -> Routing:
    """The k experts that rank behind the chosen k; of fewer than 2 k experts, from the best on."""
    k, num_experts = routing.indices.shape[-1], routing.scores.shape[-1]
    ranked = jnp.argsort(-routing.scores, axis=-1)
    return routing._replace(indices=ranked[..., (jnp.arange(k) + k) % num_experts])


def at_random(keys: Array) -> Exchange:
    """k different experts drawn uniformly, token by token, for images with these keys [B]."""
    layers = count()

    def exchange(routing: Routing) -> Routing:
        layer, (k, shape) = next(layers), (routing.indices.shape[-1], routing.scores.shape[1:])
        of_layer = jax.vmap(jax.random.fold_in, (0, None))(keys, layer)
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape))(of_layer)
        return routing._replace(indices=jnp.argsort(drawn, axis=-1)[..., :k].astype(jnp.int32))

    return exchange


def without(expert: int | Array, gate: str) -> Exchange:
    """The best k of the other experts, weighed by the gate."""

    def exchange(routing: Routing) -> Routing:
        others = jnp.where(jnp.arange(routing.scores.shape[-1]) == expert, -jnp.inf, routing.scores)
        left = jax.lax.top_k(others, routing.indices.shape[-1])[1]
        return choose(routing.scores, 1, gate, surrogate=False, indices=left)

    return exchange


def with_top_k(k: int, gate: str) -> Exchange:
    """The best k experts, however many the network usually takes, weighed by the gate."""
    return lambda routing: choose(routing.scores, k, gate, surrogate=False)


def exchanges(network: Network, keys: Array) -> dict[str, Exchange]:
    """All of them by name: ``next_best``, ``random``, ``without_e`` and ``top_k``."""
    numbers = range(network.num_experts)
    dropped = {f"without_{e}": without(e, network.gate) for e in numbers}
    if network.top_k == network.num_experts:  # nobody stands in
        dropped = {}
    counts = {f"top_{k + 1}": with_top_k(k + 1, network.gate) for k in numbers}
    return {"next_best": next_best, "random": at_random(keys), **dropped, **counts}


def predictions(
    network: Network, params: Tree, stats: Tree, images: Images, keys: Array
) -> dict[str, Labels]:
    """What the network predicts under each of ``exchanges``, int32 [B] by name.

    Args:
        network: a mixture.
        params: its parameters.
        stats: its statistics.
        images: float32 in [0, 1].
        keys: one per image, of the random experts.
    """

    def answer(name: str) -> Labels:
        exchange = exchanges(network, keys)[name]
        output = network.apply(params, stats, images, exchange=exchange)[0]
        return jnp.argmax(output.logits, axis=-1).astype(jnp.int32)

    return {name: answer(name) for name in exchanges(network, keys)}
