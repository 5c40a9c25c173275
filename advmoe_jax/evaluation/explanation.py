"""Why a network answers as it does under attack, told by its routes.

An attack on a mixture does two things at once: it changes the image that the experts see, and it
may change the route. Both are told apart by following one route with the other image; every single
pathway is tried on all images; and an attack that looks at the router alone shows what re-routing
costs without a fight over the classifier (Zhang et al., ICCV 2023, section 4).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import pgd
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.pipeline import evaluation_batches
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.accuracy import kept_choices
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import NamedAttack, Protocol
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import predictions
from advmoe_jax.routing import measures
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Images, Labels, Tree

FILE = "explanation.json"
# Radii of the curve of RA against epsilon, as multiples of the config's.
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
CURVE_STEPS = 20


class Seen(NamedTuple):
    """What became of ``n`` images under one attack; of a dense network only the first four fields.

    Attributes:
        labels: int32 [n].
        adversarial: float32 [n, H, W, C].
        clean: int32 [n], predictions on the clean images.
        attacked: int32 [n], predictions on the adversarial images.
        routes: int32 [n, D, k], experts chosen for the clean images, decision by decision.
        attacked_routes: int32 [n, D, k], those chosen for the adversarial images.
        clean_rerouted: int32 [n], predictions on the clean images along the attacked routes.
        attacked_on_route: int32 [n], predictions on the adversarial images along the clean routes.
        forced: int32 [N, n], predictions on the clean images, all along one expert's pathway.
        forced_attacked: int32 [N, n], the same on the adversarial images.
    """

    labels: np.ndarray
    adversarial: np.ndarray
    clean: np.ndarray
    attacked: np.ndarray
    routes: np.ndarray | None = None
    attacked_routes: np.ndarray | None = None
    clean_rerouted: np.ndarray | None = None
    attacked_on_route: np.ndarray | None = None
    forced: np.ndarray | None = None
    forced_attacked: np.ndarray | None = None


def explained_attack(name: str, protocol: Protocol, parts: Sequence[str]) -> NamedAttack:
    """The attack of that name, see ``named_attacks``, if it is one that can be explained.

    Raises:
        UserError: if the name is unknown, or not of an attack that perturbs every image.
    """
    attack = named_attack(name, protocol, parts)
    if attack.is_ensemble or name == "clean":
        raise UserError(f"attack {name!r} cannot be explained: choose one such as pgd20")
    return attack


def see(
    network: Network,
    params: Tree,
    stats: Tree,
    split: Split,
    attack: NamedAttack,
    key: Array,
    batch_size: int,
) -> Seen:
    """Attacks every image once, and asks the network all questions about it.

    Args:
        network: the functional network.
        params: its parameters.
        stats: its BatchNorm statistics.
        split: the images.
        attack: on the whole network.
        key: PRNG key; image ``i`` draws from ``fold_in(key, i)``, as in an evaluation.
        batch_size: images at a time.
    """
    predict = partial(_predict, network, params, stats)

    def along_each(images: Images, routing: Routing) -> np.ndarray:
        first = routing.indices[..., :1]
        routes = (Routing(jnp.full_like(first, expert)) for expert in range(network.num_experts))
        return np.stack([predict(images, route)[0] for route in routes], axis=1)

    def of_batch(indices: np.ndarray) -> dict[str, Any]:
        images, labels = to_float(jnp.asarray(split.images[indices])), split.labels[indices]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        adversarial = _perturb(network, params, stats, images, labels, keys, attack=attack)
        clean, routing = predict(images, None)
        attacked, attacked_routing = predict(adversarial, None)
        answers = {"adversarial": adversarial, "clean": clean, "attacked": attacked}
        if routing is None:
            return answers
        return answers | {
            "routes": kept_choices(routing, network),
            "attacked_routes": kept_choices(attacked_routing, network),
            "clean_rerouted": predict(images, Routing(attacked_routing.indices))[0],
            "attacked_on_route": predict(adversarial, Routing(routing.indices))[0],
            "forced": along_each(images, routing),
            "forced_attacked": along_each(adversarial, attacked_routing),
        }

    collected = []
    for indices, valid in evaluation_batches(len(split.labels), min(batch_size, len(split.labels))):
        answers = of_batch(indices)
        collected.append({name: np.asarray(x)[:valid] for name, x in answers.items()})
    joined = {name: np.concatenate([c[name] for c in collected]) for name in collected[0]}
    for name in {"forced", "forced_attacked"} & joined.keys():
        joined[name] = joined[name].T
    return Seen(labels=split.labels, **joined)


# Small programs, each used several times, for to compile is most of the time.
@partial(jax.jit, static_argnames="attack")
def _perturb(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    labels: Labels,
    keys: Array,
    *,
    attack: NamedAttack,
) -> Images:
    return attack.perturb(network, params, stats, images, labels, keys)


@jax.jit
def _predict(
    network: Network, params: Tree, stats: Tree, images: Images, routing: Routing | None
) -> tuple[Labels, Routing | None]:
    """Predictions, along the routing if one is given, and the routes taken."""
    output = network.apply(params, stats, images, routing=routing)[0]
    return predictions(output, stats), output.routing


def describe(
    seen: Seen, num_experts: int, num_classes: int, routers: int | None = None
) -> dict[str, Any] | None:
    """Load, agreement, confusion of routes and pathways in shares of 1; None for a dense network.

    Returns:
        ``load`` [N]; ``load_per_class`` [C][N], of each class's images (None for a class without
        any); ``agreement`` [D], share of first choices that survive; ``confusion`` [N][N], share of
        first choices that were the row's expert clean and the column's attacked; ``pathways``, the
        accuracy of each expert's pathway on all images ``clean`` [N] and ``attacked`` [N];
        ``accuracy`` of the images ``clean`` and ``attacked``, each on the ``clean_route`` and on
        the ``attacked_route``; ``layers`` with ``load`` [D][N] and ``confusion`` [D][N][N] if
        there are several decisions. Where tokens decide, D are the ``routers``, and tokens count
        instead of images.
    """
    if seen.routes is None:
        return None

    def of_layers(routes: np.ndarray) -> np.ndarray:
        return measures.of_layers(routes, routers)

    of_class = [of_layers(seen.routes[seen.labels == label]) for label in range(num_classes)]
    before, after = of_layers(seen.routes), of_layers(seen.attacked_routes)
    measured = {
        "load": measures.load(before, num_experts),
        "confusion": measures.confusion(before, after, num_experts),
    }

    def accuracy(predictions: np.ndarray) -> float:
        return float(np.mean(predictions == seen.labels))

    return {
        **jax.tree.map(lambda x: x.tolist(), measures.by_decision(measured)),
        "load_per_class": [
            measures.load(routes, num_experts).mean(axis=0).tolist() if len(routes) else None
            for routes in of_class
        ],
        "agreement": measures.agreement(before, after).tolist(),
        "pathways": {
            "clean": [accuracy(p) for p in seen.forced],
            "attacked": [accuracy(p) for p in seen.forced_attacked],
        },
        "accuracy": {
            "clean": {
                "clean_route": accuracy(seen.clean),
                "attacked_route": accuracy(seen.clean_rerouted),
            },
            "attacked": {
                "clean_route": accuracy(seen.attacked_on_route),
                "attacked_route": accuracy(seen.attacked),
            },
        },
    }


def robust_accuracies(
    network: Network,
    params: Tree,
    stats: Tree,
    split: Split,
    protocol: Protocol,
    key: Array,
    batch_size: int,
) -> dict[str, Any]:
    """RA against the radius of the ball: PGD whose step grows with it; one program for all radii.

    Of several exits the main one is attacked, and each image is answered by the one it leaves at.

    Takes what ``see`` takes, and the protocol, whose radius is the curve's unit. Returns
    ``epsilon`` and ``accuracy``, lists of equal length, and the attack's settings.
    """
    threat = protocol.threat
    correct = np.zeros(len(RADII))
    for indices, valid in evaluation_batches(len(split.labels), min(batch_size, len(split.labels))):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        batch = (split.images[indices], split.labels[indices], keys)
        for i, scale in enumerate(RADII):
            right = _is_right(network, params, stats, *batch, jnp.float32(scale), protocol=protocol)
            correct[i] += np.sum(np.asarray(right)[:valid])
    return {
        "epsilon": [scale * threat.epsilon for scale in RADII],
        "accuracy": (correct / len(split.labels)).tolist(),
        "attack": {
            "norm": threat.norm,
            "num_steps": CURVE_STEPS,
            "step_size_at_epsilon": protocol.step_size,
        },
    }


@partial(jax.jit, static_argnames="protocol")
def _is_right(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Array,
    labels: Labels,
    keys: Array,
    scale: Array,
    *,
    protocol: Protocol,
) -> Array:
    """bool [B]: whether images uint8 [B, H, W, C] are classified correctly under PGD."""

    def logits(images: Images) -> Array:
        return network.apply(params, stats, images)[0].logits

    threat = protocol.threat._replace(epsilon=scale * protocol.threat.epsilon)
    attack = pgd(threat, num_steps=CURVE_STEPS, step_size=scale * protocol.step_size)
    images = to_float(images)
    adversarial = attack(logits, images, labels, keys)
    # A ball without extent may leave rounding errors of a norm behind.
    adversarial = jnp.where(scale > 0, adversarial, images)
    return predictions(network.apply(params, stats, adversarial)[0], stats) == labels


def choose_examples(seen: Seen, count: int) -> Sequence[int]:
    """Up to ``count`` images that show what an attack does, of every kind as many as there are.

    The kinds: route and prediction change; only the prediction; only the route; neither. Images
    that were classified wrongly to begin with show nothing and come last.
    """
    right = seen.clean == seen.labels
    lost = seen.attacked != seen.labels
    moved = np.zeros(len(right), bool)
    if seen.routes is not None:
        moved = np.any(seen.routes[..., 0] != seen.attacked_routes[..., 0], axis=1)
    kinds = [right & lost & moved, right & lost & ~moved, right & ~lost & moved,
             right & ~lost & ~moved, ~right]  # fmt: skip
    waiting = [list(np.flatnonzero(kind)) for kind in kinds]
    chosen: list[int] = []
    while len(chosen) < min(count, len(right)):
        for queue in waiting[:-1] if any(waiting[:-1]) else waiting:
            if queue and len(chosen) < count:
                chosen.append(int(queue.pop(0)))
    return chosen
