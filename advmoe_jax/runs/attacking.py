"""A trained network attacked on given images: with a bar, and a state that a kill leaves."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from advmoe_jax.attacks import AttackReport, MoEResult
from advmoe_jax.attacks.ensembles.runner import go_on
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.batch import DeviceData
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.accuracy import Outcome, answer_images, create_evaluator
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.files import StateFile, fingerprint
from advmoe_jax.heartbeat import heartbeat, shows_bars
from advmoe_jax.models.network import Network
from advmoe_jax.types import Array, Tree


class Job(NamedTuple):
    """What every attack of an evaluation runs on.

    Attributes:
        network: what is attacked.
        params: its parameters, on the devices of the mesh.
        stats: its statistics, likewise.
        sha256: digest of the weights.
        split: images, uint8 or float32 in [0, 1], and labels.
        data: the same on the devices.
        mesh: the devices.
        batch_size: images attacked at once, at most.
        key: image ``i`` draws from ``fold_in(key, i)``.
        console: where people read.
        keep_images: whether the adversarial images are kept.
        individual: whether every attack of AutoAttack runs on all images.
        identity: what results are of besides a checkpoint: the thresholds of a multi-exit network.
        folder: where states are kept; None: nowhere.
        pause: called again and again while attacks run; if it raises, the state is saved first.
    """

    network: Network
    params: Tree
    stats: Tree
    sha256: str
    split: Split
    data: DeviceData
    mesh: Mesh
    batch_size: int
    key: Array
    console: Console
    keep_images: bool
    individual: bool
    identity: Tree
    folder: Path | None
    pause: Callable[[], None] = go_on

    def state(self, attack: NamedAttack) -> StateFile:
        """Where the attack's state is kept; under a name that is this job's alone."""
        key = np.asarray(jax.random.key_data(self.key))
        what = attack.name, attack.settings, self.sha256, self.batch_size
        how = self.mesh.size, self.keep_images, self.individual, self.identity
        owner = fingerprint([*what, *how, key, *self.split])
        if self.folder is None:
            return StateFile(None, owner)
        path = self.folder / f"{attack.name}-{owner[:12]}.npz"
        return StateFile(path, owner, writes=jax.process_index() == 0)


class Found(NamedTuple):
    """The answers under an attack, which attack succeeded per image, and what is noted beside."""

    outcome: Outcome
    fooled_by: np.ndarray | None
    noted: dict[str, Any]


def run_attack(job: Job, attack: NamedAttack) -> dict[str, Found]:
    """By the attack's name, and by those of whatever it finds besides.

    Raises:
        UserError: if the attack makes no sense on these images or this network.
    """
    try:
        return _run_ensemble(job, attack) if attack.is_ensemble else _run_batchwise(job, attack)
    except ValueError as error:
        raise UserError(f"attack {attack.name!r}: {error}") from None


def _run_batchwise(job: Job, attack: NamedAttack) -> dict[str, Found]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    hidden = not shows_bars(job.console)
    bar = Progress(*columns, console=job.console, transient=True, disable=hidden)
    row = bar.add_task(attack.name, total=len(job.split.labels))

    def words() -> str:
        done = bar.tasks[0].completed
        return f"{attack.name}: {done:,.0f} of {len(job.split.labels):,} images"

    def advance(images: int) -> None:
        bar.advance(row, images)
        job.pause()

    with bar, heartbeat(job.console, words, enabled=not job.console.quiet):
        evaluator = create_evaluator(job.network, attack, job.mesh, job.batch_size)
        outcome = evaluator(
            job.params,
            job.stats,
            job.data,
            job.key,
            warm_up=True,
            advance=advance,
            keep_images=job.keep_images and attack.name != "clean",
            state=job.state(attack),
        )
    outside = int(np.sum(outcome.outside))
    told = f"{outside} images left the ball or the pixel range and count as not attacked"
    return {attack.name: Found(outcome, None, {"warnings": [told]} if outside else {})}


def _run_ensemble(job: Job, attack: NamedAttack) -> dict[str, Found]:
    began = time.perf_counter()
    numbers = jnp.arange(len(job.split.labels), dtype=jnp.int32)
    alone = {"individual": True} if job.individual and "autoattack" in attack.name else {}
    with warnings.catch_warnings():  # they are among the results
        warnings.simplefilter("ignore", UserWarning)
        result = attack.run(
            *(job.network, job.params, job.stats),
            np.asarray(to_float(job.split.images)),
            job.split.labels,
            jax.vmap(partial(jax.random.fold_in, job.key))(numbers),
            batch_size=-(-job.batch_size // job.mesh.size) * job.mesh.size,
            state_file=job.state(attack).path,
            progress=not job.console.quiet,
            mesh=job.mesh,
            pause=job.pause,
            **alone,
        )
    answers = answer_images(
        *(job.network, attack.threat, job.mesh, job.batch_size),
        *(job.params, job.stats, job.data, result.adversarial),
    )
    answers = answers._replace(seconds=time.perf_counter() - began)
    noted: dict[str, Any] = {
        "parts": {name: _part(report) for name, report in result.attacks.items()},
        "warnings": [*result.warnings, *_of_no_choice(job.network, attack)],
    }
    if not isinstance(result, MoEResult):
        return {attack.name: Found(answers, result.fooled_by, noted)}
    # Pathways held fixed have judged, too: what the network itself says stands apart.
    by_network = answers._replace(correct=answers.correct & result.network_robust)
    outcome = answers._replace(correct=result.robust & by_network.correct)
    noted["network_accuracy"] = by_network.accuracy
    found = {attack.name: Found(outcome, result.fooled_by, noted)}
    if attack.name.startswith("moe"):
        name = attack.name.replace("moe", "moe_network", 1)
        found[name] = Found(by_network, None, {"judge": "the network"})
    return found


def _of_no_choice(network: Network, attack: NamedAttack) -> list[str]:
    if attack.record.needs == "router" and network.top_k == network.num_experts:
        return [f"all {network.top_k} experts are always chosen: there is no route to change"]
    return []


def _part(report: AttackReport) -> dict[str, Any]:
    return {
        "tried": report.tried,
        "fooled": report.fooled,
        "robust_accuracy": report.accuracy,
        **({} if report.alone is None else {"alone": report.alone}),
        "seconds": round(report.seconds, 2),
        "first_call_seconds": round(report.first_call_seconds, 2),
    }
