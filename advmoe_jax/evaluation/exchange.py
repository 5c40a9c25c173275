"""What a mixture answers if its experts are exchanged at test time.

An exchange makes of every decision another one, where it is made: layers behind see what comes of
it. Where other experts stand in for the chosen ones (``next_best``, ``random``), they take over
these ones' weights, so that the experts alone are exchanged; where fewer or others are allowed
(``without``, ``top_k``), the gate weighs what is left.
"""

from collections.abc import Callable
from functools import partial
from itertools import count

import jax
import jax.numpy as jnp

from advmoe_jax.models.network import Network
from advmoe_jax.models.output import answer_of
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
    return {
        name: _exchange(network, kind, keys, number)
        for name, (kind, number) in _kinds(network).items()
    }


def predictions(
    network: Network, params: Tree, stats: Tree, images: Images, keys: Array
) -> dict[str, Labels]:
    """What the network predicts under each of ``exchanges``, int32 [B] by name.

    Each is a small program of its own, and ``without_e`` one for all e: in one program, sixteen
    experts would be 68 passes to compile.

    Args:
        network: a mixture.
        params: its parameters.
        stats: its statistics.
        images: float32 in [0, 1].
        keys: one per image, of the random experts.
    """
    given = (network, params, stats, images, keys)
    return {
        name: _of_count(*given, number) if kind == "top" else _of_kind(*given, number, kind=kind)
        for name, (kind, number) in _kinds(network).items()
    }


def _kinds(network: Network) -> dict[str, tuple[str, int]]:
    """Every exchange by its name: what kind it is, and the expert left out or the count k."""
    numbers = range(network.num_experts)
    dropped = {f"without_{e}": ("without", e) for e in numbers}
    if network.top_k == network.num_experts:  # nobody stands in
        dropped = {}
    counts = {f"top_{k + 1}": ("top", k + 1) for k in numbers}
    return {"next_best": ("next_best", 0), "random": ("random", 0), **dropped, **counts}


def _exchange(network: Network, kind: str, keys: Array, number: int | Array) -> Exchange:
    if kind == "next_best":
        return next_best
    if kind == "random":
        return at_random(keys)
    return (without if kind == "without" else with_top_k)(number, network.gate)


def _predict(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    keys: Array,
    number: int | Array,
    kind: str,
) -> Labels:
    exchange = _exchange(network, kind, keys, number)
    logits = network.apply(params, stats, images, exchange=exchange)[0].logits
    return answer_of(logits)


_of_kind = jax.jit(_predict, static_argnames="kind")
# The number of experts is a shape.
_of_count = jax.jit(partial(_predict, kind="top"), static_argnums=5)
