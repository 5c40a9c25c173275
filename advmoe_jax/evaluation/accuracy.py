"""What a network answers under attack, image by image."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from advmoe_jax.data import pipeline
from advmoe_jax.data.augment import to_float
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.suite import NamedAttack
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import DATA_AXIS, parallel

Array = jax.Array
Tree = dict[str, Any]


class Outcome(NamedTuple):
    """A network's answers to ``n`` images, in the order of the data.

    Attributes:
        correct: bool [n].
        predictions: int32 [n].
        choices: int32 [n, k], the experts chosen, best first ([n, L, k] if each of L layers has its
            own router); None for a dense network.
        entropy: float32 [n] or [n, L], of softmax(scores), in nats; None for a dense network.
        seconds: time spent, compilation excluded if the evaluator was asked to warm up.
    """

    correct: np.ndarray
    predictions: np.ndarray
    choices: np.ndarray | None
    entropy: np.ndarray | None
    seconds: float

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
        data: pipeline.DeviceData,
        key: Array,
        *,
        warm_up: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Attacks and classifies every image of ``data``.

        Args:
            params: parameters.
            stats: BatchNorm statistics.
            data: images and labels.
            key: PRNG key; image ``i`` draws from ``fold_in(key, i)``, whatever the batch size.
            warm_up: run the first batch once before the clock starts.
            advance: told the number of images after each batch.
        """


def create_evaluator(
    network: Network, attack: NamedAttack, mesh: Mesh, batch_size: int
) -> Evaluator:
    """Compiles once; every batch has ``batch_size`` images, rounded up to suit the devices.

    Raises:
        UserError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise UserError(f"evaluation.batch_size={batch_size} must be at least 1")
    batch_size = -(-batch_size // mesh.size) * mesh.size

    def on_device(
        params: Tree, stats: Tree, data: pipeline.DeviceData, indices: Array, key: Array
    ) -> dict[str, Array]:
        images, labels = pipeline.take(data, indices)
        images = to_float(images)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        images = attack.perturb(network, params, stats, images, labels, keys)
        output = network.apply(params, stats, images)[0]
        answers = {"predictions": jnp.argmax(output.logits, axis=-1).astype(jnp.int32)}
        answers["correct"] = answers["predictions"] == labels
        if output.routing is not None:
            log_probs = jax.nn.log_softmax(output.routing.scores)
            answers["entropy"] = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
            answers["choices"] = output.routing.indices
        return jax.tree.map(lambda x: lax.all_gather(x, DATA_AXIS, tiled=True), answers)

    replicated, spread = PartitionSpec(), PartitionSpec(DATA_AXIS)
    specs = (replicated, replicated, replicated, spread, replicated)
    compiled = parallel(on_device, mesh, in_specs=specs)

    def evaluate(
        params: Tree,
        stats: Tree,
        data: pipeline.DeviceData,
        key: Array,
        *,
        warm_up: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Outcome:
        batches = list(pipeline.evaluation_batches(len(data.labels), batch_size))
        if warm_up:
            jax.block_until_ready(compiled(params, stats, data, batches[0][0], key))
        start = time.perf_counter()
        collected = []
        for indices, valid in batches:
            answers = compiled(params, stats, data, indices, key)
            collected.append({k: np.asarray(v)[:valid] for k, v in answers.items()})
            if advance is not None:
                advance(valid)
        seconds = time.perf_counter() - start
        joined = {k: np.concatenate([c[k] for c in collected]) for k in collected[0]}
        return Outcome(
            correct=joined["correct"],
            predictions=joined["predictions"],
            choices=joined.get("choices"),
            entropy=joined.get("entropy"),
            seconds=seconds,
        )

    return evaluate
