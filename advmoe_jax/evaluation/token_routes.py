"""What an attack does to the routes of tokens, and how much the routes matter.

The measures of the study of V-MoE's robustness (Puigcerver et al., NeurIPS 2022, arXiv 2210.10253):
share of images whose prediction changes, and of experts exchanged; and what its code does not have:
exchanged experts, attacks on frozen routes, and the neighbours' part in an image's answer.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import pgd
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.pipeline import evaluation_batches
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation.exchange import exchanges, predictions
from advmoe_jax.evaluation.explanation import Seen
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import answer_of
from advmoe_jax.routing import measures
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Images, Labels, Tree

FROZEN_STEPS = 20


def are_routed(network: Network) -> bool:
    """Whether it is tokens that decide."""
    return len(network.decisions) > network.num_routers > 0


def grid_of(network: Network) -> tuple[tuple[int, int], bool]:
    """Patches in a column and in a row of an image, and whether there is a class token."""
    tokens = len(network.decisions) // network.num_routers
    side = math.isqrt(tokens)
    return (side, side), tokens > side * side


def changes(seen: Seen, network: Network) -> dict[str, Any]:
    """How routes change under the attack, in shares of the experts chosen: 1 - IoU.

    Returns:
        ``layers`` [L], ``tokens`` [L][T] of each token (the class token first, if there is one),
        ``images``, the deciles of the images' means, and ``predictions``, the share of images whose
        prediction changes; ``load_clean`` and ``load_attacked`` [L][N].
    """
    layers, routers = network.num_routers, network.num_routers
    changed = 1 - measures.overlap(seen.routes, seen.attacked_routes)
    changed = changed.reshape(len(changed), layers, -1)

    def load(routes: np.ndarray) -> list[list[float]]:
        return measures.load(measures.of_layers(routes, routers), network.num_experts).tolist()

    return {
        "layers": changed.mean(axis=(0, 2)).tolist(),
        "tokens": changed.mean(axis=0).tolist(),
        "images": np.quantile(changed.mean(axis=(1, 2)), np.linspace(0, 1, 11)).tolist(),
        "predictions": float(np.mean(seen.clean != seen.attacked)),
        "load_clean": load(seen.routes),
        "load_attacked": load(seen.attacked_routes),
    }


def importance_of_routes(
    network: Network,
    params: Tree,
    stats: Tree,
    split: Split,
    adversarial: np.ndarray,
    protocol: Protocol,
    key: Array,
    batch_size: int,
) -> dict[str, Any]:
    """How much the choice of experts matters: exchanges, and attacks on frozen routes.

    Args:
        network: a mixture.
        params: its parameters.
        stats: its statistics.
        split: the images.
        adversarial: float32 [n, H, W, C], of an attack on the network as it is.
        protocol: ball and step size of the attack on frozen routes, of ``FROZEN_STEPS`` steps.
        key: PRNG key; image ``i`` draws from ``fold_in(key, i)``.
        batch_size: images at a time.

    Returns:
        ``exchange``: by its name (see ``exchange``; ``own``: none), for the images ``clean`` and
        ``attacked``: ``accuracy`` and ``changed``, the share of predictions that are others than
        the network's own on the same images. ``frozen``: accuracy under an attack on the network
        held on its clean routes, ``on_clean_routes``, and of the same images ``on_free_routes``,
        the network as it is: what the attack is worth if routes may move;
        ``free_on_clean_routes``: of the images given, held on the clean routes.
    """
    collected: list[dict[str, np.ndarray]] = []
    for indices, valid in evaluation_batches(len(split.labels), min(batch_size, len(split.labels))):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        batch = (split.images[indices], adversarial[indices], split.labels[indices], keys)
        answers = _answers(network, params, stats, *batch, protocol)
        collected.append({name: np.asarray(x)[:valid] for name, x in answers.items()})
    found = {name: np.concatenate([c[name] for c in collected]) for name in collected[0]}

    def accuracy(name: str) -> float:
        return float(np.mean(found[name] == split.labels))

    return {
        "exchange": {
            name: {
                kind: {
                    "accuracy": accuracy(f"{kind}/{name}"),
                    "changed": float(np.mean(found[f"{kind}/{name}"] != found[f"{kind}/own"])),
                }
                for kind in ("clean", "attacked")
            }
            for name in ["own", *exchanges(network, key[None])]
        },
        "frozen": {
            **{name: accuracy(name) for name in ("on_clean_routes", "on_free_routes")},
            "free_on_clean_routes": accuracy("free_on_clean_routes"),
            "num_steps": FROZEN_STEPS,
            "step_size": protocol.step_size,
        },
    }


def _answers(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Array,
    adversarial: Images,
    labels: Labels,
    keys: Array,
    protocol: Protocol,
) -> dict[str, Labels]:
    """Predictions on images uint8 and on adversarial ones, all ways."""
    weights, images = (network, params, stats), to_float(images)
    answers = _of_frozen(*weights, images, adversarial, labels, keys, protocol=protocol)
    for kind, shown in (("clean", images), ("attacked", adversarial)):
        answers[f"{kind}/own"] = _predict(*weights, shown)
        exchanged = predictions(*weights, shown, keys)
        answers |= {f"{kind}/{name}": found for name, found in exchanged.items()}
    return answers


@partial(jax.jit, static_argnames="protocol")
def _of_frozen(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    adversarial: Images,
    labels: Labels,
    keys: Array,
    *,
    protocol: Protocol,
) -> dict[str, Labels]:
    """Predictions that follow the clean routes, or come of an attack on them."""
    weights = (network, params, stats)
    route = Routing(network.route(params, stats, images)[0].indices)
    attack = pgd(protocol.threat, num_steps=FROZEN_STEPS, step_size=protocol.step_size)
    held = attack(
        lambda x: network.apply(params, stats, x, routing=route)[0].logits, images, labels, keys
    )
    return {
        "on_clean_routes": _predict(*weights, held, route),
        "on_free_routes": _predict(*weights, held),
        "free_on_clean_routes": _predict(*weights, adversarial, route),
    }


@jax.jit
def _predict(
    network: Network, params: Tree, stats: Tree, images: Images, routing: Routing | None = None
) -> Labels:
    logits = network.apply(params, stats, images, routing=routing)[0].logits
    return answer_of(logits)


def neighbours(
    network: Network, params: Tree, stats: Tree, split: Split, batch_size: int
) -> dict[str, float]:
    """What an image's answer owes to the other images of its batch.

    Every image is classified twice, among the neighbours of the data's order and among others,
    always the same ones.

    Args:
        network: a mixture; its ``capacity.evaluation`` says how many places experts have.
        params: its parameters.
        stats: its statistics.
        split: the images.
        batch_size: images at a time.

    Returns:
        Shares of images with another ``predictions``, and with another ``routes``, drops included;
        ``accuracy`` in the data's order; ``dropped``, the share of choices without a place.
    """
    total = len(split.labels)
    size = min(batch_size, total)
    orders = (np.arange(total), np.random.default_rng(0).permutation(total))
    found = []
    for order in orders:
        predicted, kept = np.zeros(total, np.int32), None
        for places, valid in evaluation_batches(total, size):
            at = order[places]
            answers = jax.device_get(_kept(network, params, stats, split.images[at]))
            kept = np.zeros((total, *answers[1].shape[1:]), np.int32) if kept is None else kept
            predicted[at[:valid]], kept[at[:valid]] = (x[:valid] for x in answers)
        found.append((predicted, kept))
    (one, routes), (other, other_routes) = found
    return {
        "predictions": float(np.mean(one != other)),
        "routes": float(np.mean(np.any(routes != other_routes, axis=(1, 2)))),
        "accuracy": float(np.mean(one == split.labels)),
        "dropped": float(np.mean(routes < 0)),
    }


@jax.jit
def _kept(network: Network, params: Tree, stats: Tree, images: Array) -> tuple[Labels, Array]:
    """Predictions, and the experts that had a place; -1 for those that had none."""
    output = network.apply(params, stats, to_float(images))[0]
    routing = output.routing
    chosen = jnp.where(routing.weights > 0, routing.indices, -1)
    return answer_of(output.logits), chosen
