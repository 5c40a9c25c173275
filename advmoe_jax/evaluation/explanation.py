"""Why a network answers as it does under attack, told by its routes.

An attack on a mixture does two things at once: it changes the image that the experts see, and it
may change the route. Both are told apart by following one route with the other image; every single
pathway is tried on all images; and an attack that looks at the router alone shows what re-routing
costs without a fight over the classifier (Zhang et al., ICCV 2023, section 4).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.attacks import make_threat, pgd
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.pipeline import evaluation_batches
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.suite import NamedAttack, Perturb, named_attack
from advmoe_jax.models.network import Network
from advmoe_jax.routing.choice import Routing

Array = jax.Array
Tree = dict[str, Any]

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
        routes: int32 [n, L, k], experts chosen for the clean images; L is 1 for a global router.
        attacked_routes: int32 [n, L, k], those chosen for the adversarial images.
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


def explained_attack(name: str, config: ConfigDict, is_moe: bool) -> NamedAttack:
    """The attack of that name, see ``suite``, if it is one that can be explained.

    Raises:
        UserError: if the name is unknown, or not of an attack that perturbs every image.
    """
    attack = named_attack(name, config, is_moe)
    if attack.perturb is None or name == "clean":
        raise UserError(f"attack {name!r} cannot be explained: choose one such as pgd20")
    return attack


def see(
    network: Network,
    params: Tree,
    stats: Tree,
    split: Split,
    attack: NamedAttack,
    key: Array,
    *,
    gate: str,
    batch_size: int,
) -> Seen:
    """Attacks every image once, and asks the network all questions about it.

    Args:
        network: the functional network.
        params: its parameters.
        stats: its BatchNorm statistics.
        split: the images.
        attack: on the whole network, see ``suite``.
        key: PRNG key; image ``i`` draws from ``fold_in(key, i)``, as in an evaluation.
        gate: the network's, see ``router.choose``.
        batch_size: images at a time.
    """

    perturb, follow = _perturb(network, attack.perturb), _follow(network)

    def of_batch(indices: np.ndarray) -> dict[str, Any]:
        images, labels = to_float(jnp.asarray(split.images[indices])), split.labels[indices]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        adversarial = perturb(params, stats, images, labels, keys)
        predict = partial(follow, params, stats)
        clean, routing = predict(images, None)
        attacked, attacked_routing = predict(adversarial, None)
        answers = {"adversarial": adversarial, "clean": clean, "attacked": attacked}
        if routing is None:
            return answers
        forced = [
            [predict(x, _forced(r, expert, gate))[0] for expert in range(network.num_experts)]
            for x, r in ((images, routing), (adversarial, attacked_routing))
        ]
        return answers | {
            "routes": _by_layer(routing.indices),
            "attacked_routes": _by_layer(attacked_routing.indices),
            "clean_rerouted": predict(images, attacked_routing)[0],
            "attacked_on_route": predict(adversarial, routing)[0],
            "forced": np.stack(forced[0], axis=1),
            "forced_attacked": np.stack(forced[1], axis=1),
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
@lru_cache(maxsize=16)
def _perturb(network: Network, perturb: Perturb) -> Callable[..., Array]:
    """(params, stats, images, labels, keys) -> adversarial images."""
    return jax.jit(partial(perturb, network))


@lru_cache(maxsize=16)
def _follow(network: Network) -> Callable[..., tuple[Array, Routing | None]]:
    """(params, stats, images, routing or None) -> predictions, and the routes taken."""

    @jax.jit
    def follow(params: Tree, stats: Tree, images: Array, routing: Routing | None) -> Any:
        output = network.apply(params, stats, images, routing=routing)[0]
        return jnp.argmax(output.logits, axis=-1).astype(jnp.int32), output.routing

    return follow


def _forced(routing: Routing, expert: int, gate: str) -> Routing:
    """The same routing with one expert as every choice, weighted as the gate weighs it."""
    indices = jnp.full_like(routing.indices, expert)
    weights = jnp.ones_like(routing.weights)
    if gate == "softmax":
        weights = weights * jax.nn.softmax(routing.scores)[..., expert, None]
    return routing._replace(indices=indices, weights=weights)


def _by_layer(indices: Array) -> Array:
    return indices if indices.ndim == 3 else indices[:, None]


def describe(seen: Seen, num_experts: int, num_classes: int) -> dict[str, Any] | None:
    """Load, agreement, confusion of routes and pathways in shares of 1; None for a dense network.

    Returns:
        ``load`` [N]; ``load_per_class`` [C][N], of each class's images (None for a class without
        any); ``agreement`` [L], share of first choices that survive; ``confusion`` [N][N], share of
        first choices that were the row's expert clean and the column's attacked; ``pathways``, the
        accuracy of each expert's pathway on all images ``clean`` [N] and ``attacked`` [N];
        ``accuracy`` of the images ``clean`` and ``attacked``, each on the ``clean_route`` and on
        the ``attacked_route``; ``layers`` with ``load`` [L][N] and ``confusion`` [L][N][N] if
        there are several.
    """
    if seen.routes is None:
        return None
    first, second = seen.routes[..., 0], seen.attacked_routes[..., 0]
    chosen = np.eye(num_experts)[seen.routes].mean(axis=2)  # [n, L, N]
    confusion = np.einsum("nli,nlj->lij", np.eye(num_experts)[first], np.eye(num_experts)[second])
    confusion /= len(first)
    of_class = [chosen[seen.labels == label] for label in range(num_classes)]

    def accuracy(predictions: np.ndarray) -> float:
        return float(np.mean(predictions == seen.labels))

    found = {
        "load": chosen.mean(axis=(0, 1)).tolist(),
        "load_per_class": [x.mean(axis=(0, 1)).tolist() if len(x) else None for x in of_class],
        "agreement": np.mean(first == second, axis=0).tolist(),
        "confusion": confusion.mean(axis=0).tolist(),
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
    if first.shape[1] > 1:
        loads = chosen.mean(axis=0)
        found["layers"] = {"load": loads.tolist(), "confusion": confusion.tolist()}
    return found


def robust_accuracies(
    network: Network,
    params: Tree,
    stats: Tree,
    split: Split,
    config: ConfigDict,
    key: Array,
) -> dict[str, Any]:
    """RA against the radius of the ball: PGD whose step grows with it; one program for all radii.

    Takes what ``see`` takes, and the whole config. Returns ``epsilon`` and ``accuracy``, lists of
    equal length, and the attack's settings.
    """
    norm, radius = config.attack.norm, config.attack.epsilon
    step_size = config.evaluation.step_size
    is_right = _is_right(network, norm, radius, step_size)
    batch_size = min(config.evaluation.batch_size, len(split.labels))
    correct = np.zeros(len(RADII))
    for indices, valid in evaluation_batches(len(split.labels), batch_size):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        batch = (split.images[indices], split.labels[indices], keys)
        for i, scale in enumerate(RADII):
            right = is_right(params, stats, *batch, jnp.float32(scale))
            correct[i] += np.sum(np.asarray(right)[:valid])
    return {
        "epsilon": [scale * radius for scale in RADII],
        "accuracy": (correct / len(split.labels)).tolist(),
        "attack": {"norm": norm, "num_steps": CURVE_STEPS, "step_size_at_epsilon": step_size},
    }


@lru_cache(maxsize=16)
def _is_right(network: Network, norm: str, radius: float, step_size: float) -> Callable[..., Array]:
    """(params, stats, images, labels, keys, scale of the ball) -> bool [B]."""

    @jax.jit
    def is_right(
        params: Tree, stats: Tree, images: Array, labels: Array, keys: Array, scale: Array
    ) -> Array:
        def logits(images: Array) -> Array:
            return network.apply(params, stats, images)[0].logits

        threat = make_threat(norm, radius)._replace(epsilon=scale * radius)
        attack = pgd(threat, num_steps=CURVE_STEPS, step_size=scale * step_size)
        images = to_float(images)
        adversarial = attack(logits, images, labels, keys)
        # A ball without extent may leave rounding errors of a norm behind.
        adversarial = jnp.where(scale > 0, adversarial, images)
        return jnp.argmax(logits(adversarial), axis=-1) == labels

    return is_right


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
