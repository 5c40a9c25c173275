"""What a network answers under attack, image by image."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from advmoe_jax.attacks import Threat
from advmoe_jax.attacks.constraints import distance
from advmoe_jax.attacks.stepwise import select
from advmoe_jax.data import pipeline
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.batch import DeviceData
from advmoe_jax.data.stream import Streamed
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.files import StateFile
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import answer_of
from advmoe_jax.models.trunk import entropy, first_exit, thresholds_of
from advmoe_jax.parallel import batch_spec, on_mesh, spread, state_specs, whole
from advmoe_jax.routing import measures
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Tree

_WHOLE = PartitionSpec()


class Outcome(NamedTuple):
    """A network's answers to ``n`` images, in the order of the data.

    Attributes:
        correct: bool [n].
        predictions: int32 [n]; -1 where logits are no numbers, which is never right.
        choices: int32 [n, D, k], the experts chosen, best first; None for a network without a
            router.
        entropy: float32 [n, D], of softmax(scores), in nats; None likewise.
        seconds: time spent, compilation excluded if the evaluator was asked to warm up.
        outside: bool [n], images that an attack left outside of the ball or of the pixel range:
            the answer is the one to the clean image.
        images: float32 [n, H, W, C], what was classified; None unless asked for.
        exits: int32 [n], the exit, from 0, at which each image left; None for a network without
            side exits, whose predictions otherwise are those of that exit.
        exit_correct: bool [n, exits], whether each exit would be right; None likewise.
        entropies: float32 [n, side exits], in nats, see ``trunk.entropy``; None likewise.
    """

    correct: np.ndarray
    predictions: np.ndarray
    choices: np.ndarray | None
    entropy: np.ndarray | None
    seconds: float
    outside: np.ndarray | None = None
    images: np.ndarray | None = None
    exits: np.ndarray | None = None
    exit_correct: np.ndarray | None = None
    entropies: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """Share of images classified correctly, in [0, 1]."""
        return float(np.mean(self.correct))


class Evaluator(Protocol):
    """(params, stats, data, key) -> Outcome."""

    def __call__(
        self,
        params: Tree,
        stats: Tree,
        data: DeviceData | Streamed,
        key: Array,
        *,
        warm_up: bool = False,
        advance: Callable[[int], None] | None = None,
        keep_images: bool = False,
        state: StateFile | None = None,
    ) -> Outcome:
        """Attacks and classifies every image of ``data``.

        Args:
            params: parameters.
            stats: BatchNorm statistics.
            data: images and labels, see ``pipeline.put``.
            key: PRNG key; image ``i`` draws from ``fold_in(key, i)``, whatever the batch size.
            warm_up: run the first batch once before the clock starts.
            advance: told the number of images after each batch; if it raises, the batch is saved
                first.
            keep_images: whether the outcome holds the images.
            state: where to keep the batches done, and to go on from.
        """


def create_evaluator(
    network: Network, attack: NamedAttack, mesh: Mesh, batch_size: int
) -> Evaluator:
    """Compiles once; every batch has ``batch_size`` images, rounded up to suit the devices.

    The attack is one program, the answer to its images another: a plain forward pass, the same for
    all attacks, that also looks whether the images are in the ball and in the pixel range.

    Raises:
        UserError: if the batch size is not positive, or the attack is not one program.
    """
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size={batch_size} must be at least 1")
    if attack.is_ensemble:
        raise UserError(f"attack {attack.name!r} is not for this: choose one such as pgd10")
    batch_size = -(-batch_size // mesh.size) * mesh.size
    threat = attack.threat

    def evaluate(
        params: Tree,
        stats: Tree,
        data: DeviceData | Streamed,
        key: Array,
        *,
        warm_up: bool = False,
        advance: Callable[[int], None] | None = None,
        keep_images: bool = False,
        state: StateFile | None = None,
    ) -> Outcome:
        of_network = network, params, stats

        def run(indices: np.ndarray, clean: DeviceData) -> dict[str, Array]:
            images = _perturb(*of_network, clean, indices, key, attack=attack, mesh=mesh)
            answers, images = _answer(
                *of_network, clean, images, threat.epsilon, norm=threat.norm, mesh=mesh
            )
            return answers | ({"images": images} if keep_images else {})

        batches = list(pipeline.evaluation_batches(len(data.labels), batch_size))
        read = partial(pipeline.batches_at, data, mesh)
        return _collect(run, read, batches, advance, state or StateFile(None, ""), warm_up)

    return evaluate


def answer_images(
    network: Network,
    threat: Threat,
    mesh: Mesh,
    batch_size: int,
    params: Tree,
    stats: Tree,
    data: DeviceData | Streamed,
    images: np.ndarray,
) -> Outcome:
    """The network's answers to adversarial images made elsewhere, float32 [n, H, W, C].

    As ``create_evaluator``'s: by a plain forward pass, and checked against ball and pixel range.
    """
    batch_size = -(-batch_size // mesh.size) * mesh.size
    sharding = NamedSharding(mesh, batch_spec(mesh))

    def run(indices: np.ndarray, clean: DeviceData) -> dict[str, Array]:
        # Where an evaluator's attack leaves its images: else two programs are compiled.
        attacked = spread(images[indices], sharding)
        answers, attacked = _answer(
            *(network, params, stats, clean, attacked, threat.epsilon),
            norm=threat.norm,
            mesh=mesh,
        )
        return answers | {"images": attacked}

    batches = list(pipeline.evaluation_batches(len(data.labels), batch_size))
    read = partial(pipeline.batches_at, data, mesh)
    return _collect(run, read, batches, None, StateFile(None, ""))


def kept_choices(routing: Routing, network: Network) -> Int[Array, "batch decisions k"]:
    """The experts chosen; -1 in the place of one that had no place for the choice."""
    if not network.capacity.evaluation:
        return routing.indices
    return jnp.where(routing.weights > 0, routing.indices, -1)


def routing_summary(clean: Outcome, num_experts: int, routers: int | None = None) -> Tree | None:
    """Load, share of choices per expert, and mean entropy (nats); None without a router.

    Several layers: means over them, and ``layers`` holds the same of each. ``routers``: see
    ``measures.of_layers``.
    """
    if clean.choices is None:
        return None
    choices, entropy = (measures.of_layers(x, routers) for x in (clean.choices, clean.entropy))
    measured = {
        "load": measures.load(choices, num_experts),
        "entropy": np.mean(entropy, axis=0),
    }
    summary = measures.by_decision(measured)
    return jax.tree.map(lambda x: x.tolist(), summary)


def agreement(clean: Outcome, attacked: Outcome) -> float | None:
    """Share of first choices that survive the attack; None without a router."""
    if clean.choices is None:
        return None
    return float(np.mean(measures.agreement(clean.choices, attacked.choices)))


@partial(jax.jit, static_argnames=("attack", "mesh"))
def _perturb(
    network: Network,
    params: Tree,
    stats: Tree,
    clean: DeviceData,
    indices: Array,
    key: Array,
    *,
    attack: NamedAttack,
    mesh: Mesh,
) -> Array:
    """The adversarial images, which stay where they are."""

    def on_device(
        params: Tree, stats: Tree, clean: DeviceData, indices: Array, key: Array
    ) -> Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        return attack.perturb(network, params, stats, to_float(clean.images), clean.labels, keys)

    of_params, part = state_specs(params, network.expert_parameters, mesh), batch_spec(mesh)
    specs = (of_params, _WHOLE, part, part, _WHOLE)
    mapped = on_mesh(on_device, mesh, in_specs=specs, out_specs=part)
    return mapped(params, stats, clean, indices, key)


@partial(jax.jit, static_argnames=("norm", "mesh"))
def _answer(
    network: Network,
    params: Tree,
    stats: Tree,
    data: DeviceData,
    images: Array,
    epsilon: Array,
    *,
    norm: str,
    mesh: Mesh,
) -> tuple[dict[str, Array], Array]:
    """Answers, which are whole on every device, and what was classified, which stays."""

    def on_device(
        params: Tree,
        stats: Tree,
        data: DeviceData,
        images: Array,
        epsilon: Array,
    ) -> tuple[dict[str, Array], Array]:
        clean, labels = to_float(data.images), data.labels
        threat = Threat(norm, epsilon)
        axes = tuple(range(1, images.ndim))
        inside = distance(threat, images, clean) <= epsilon * (1 + 1e-5) + 1e-5
        inside &= jnp.all((images >= threat.lower) & (images <= threat.upper), axis=axes)
        images = select(inside, images, clean)
        output = network.apply(params, stats, images)[0]
        answers = {"predictions": answer_of(output.logits)}
        if output.exits is not None:
            answers = _leaving(output.exits, thresholds_of(stats), labels)
        answers["correct"] = answers["predictions"] == labels
        answers["outside"] = ~inside
        if output.routing is not None:
            answers["entropy"] = measures.entropy(output.routing.scores)
            answers["choices"] = kept_choices(output.routing, network)
        answers = jax.tree.map(lambda x: lax.all_gather(x, mesh.axis_names, tiled=True), answers)
        return answers, images

    of_params, part = state_specs(params, network.expert_parameters, mesh), batch_spec(mesh)
    specs = (of_params, _WHOLE, part, part, _WHOLE)
    mapped = on_mesh(on_device, mesh, in_specs=specs, out_specs=(_WHOLE, part))
    return mapped(params, stats, data, images, epsilon)


def _leaving(exits: tuple[Array, ...], thresholds: Array, labels: Array) -> dict[str, Array]:
    """Predictions of the exit that each image leaves at, and what every exit says."""
    answers = jnp.stack(exits, axis=1)
    entropies = entropy(answers[:, :-1])
    taken = first_exit(entropies, thresholds)
    said = answer_of(answers)
    return {
        "predictions": jnp.take_along_axis(said, taken[:, None], axis=1)[:, 0],
        "exits": taken,
        "exit_correct": said == labels[:, None],
        "entropies": entropies,
    }


def _collect(
    run: Callable[[np.ndarray, DeviceData], dict[str, Array]],
    read: Callable[[Sequence[np.ndarray]], Iterator[DeviceData]],
    batches: Sequence[tuple[np.ndarray, int]],
    advance: Callable[[int], None] | None,
    state: StateFile,
    warm_up: bool = False,
) -> Outcome:
    """All batches, from where a file left off."""
    found = state.load() or {}
    begin, earlier = int(found.pop("batches", 0)), float(found.pop("seconds", 0.0))
    collected = [found] if found else []
    if advance is not None and begin:
        advance(sum(valid for _, valid in batches[:begin]))
    left = [indices for indices, _ in batches[begin:]]
    if warm_up and left:
        jax.block_until_ready(run(left[0], next(read(left[:1]))))
    start = time.perf_counter()
    inputs = zip(batches[begin:], read(left), strict=True)
    for number, ((indices, valid), clean) in enumerate(inputs, begin + 1):
        collected.append({k: v[:valid] for k, v in whole(run(indices, clean)).items()})

        def save(number: int = number) -> None:
            collected[:] = [_joined(collected)]
            seconds = earlier + time.perf_counter() - start
            spent = {"batches": np.array(number), "seconds": np.array(seconds)}
            state.save(collected[0] | spent)

        try:
            if advance is not None:
                advance(valid)
        except BaseException:
            save()
            raise
        if state.is_due or number == len(batches):
            save()
    seconds = earlier + time.perf_counter() - start
    return Outcome(
        **{name: None for name in ("choices", "entropy")} | _joined(collected), seconds=seconds
    )


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
