"""Evaluates a trained run on its test split: ``results.json``, outcomes, adversarial images."""

import json
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from advmoe_jax.attacks import AttackReport, MoEResult
from advmoe_jax.data import pipeline
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.batch import DeviceData
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import exits, results
from advmoe_jax.evaluation.accuracy import Outcome, answer_images, create_evaluator
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.evaluation.exit_attacks import check_exits
from advmoe_jax.evaluation.outcomes import write_examples, write_outcome
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.evaluation.wanted import other_threat, parse_attacks
from advmoe_jax.files import StateFile, fingerprint, write_bytes
from advmoe_jax.heartbeat import heartbeat
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.parallel import data_mesh, replicate, replicated_shapes
from advmoe_jax.reports.exit_examples import FILE as EXIT_EXAMPLES
from advmoe_jax.reports.exit_examples import examples_by_exit
from advmoe_jax.routing.measures import collapse_warnings
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.directory import Weights
from advmoe_jax.runs.leaving import Leaving, check_rule, choose
from advmoe_jax.runs.lock import locked
from advmoe_jax.runs.rehearsal import check_processes
from advmoe_jax.types import Array, Tree


class Asked(NamedTuple):
    """What an evaluation is asked for.

    Attributes:
        attacks: comma-separated names, see ``evaluation.named_attacks``.
        examples: number of test images; 0 for all.
        batch_size: images attacked at once; 0 for the config's.
        norm: another norm than the config's, or empty.
        epsilon: another radius than the config's, such as ``8/255``, or empty.
        which: ``best`` by the validation split, or ``last``.
        save_examples: whether to write the adversarial images.
        thresholds: another rule than the config's for when images leave early, or empty; see
            ``evaluation.thresholds``.
        thresholds_from: the split that they are chosen on, ``validation`` or ``test``.
        individual: whether every attack of AutoAttack runs on all images, so that each one's own
            robust accuracy is known; costs more.
    """

    attacks: str
    examples: int = 0
    batch_size: int = 0
    norm: str = ""
    epsilon: str = ""
    which: str = "best"
    save_examples: bool = False
    individual: bool = False
    thresholds: str = ""
    thresholds_from: str = "validation"


def evaluate(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    asked: Asked,
    console: Console,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluates the run in ``workdir`` on its test split and writes ``results.json``.

    Also ``outcomes/<attack>.npz`` and, if asked, ``examples/<attack>.npz`` (see
    ``evaluation.outcomes``). Results of fewer images than are there already replace nothing: they
    are named by their count, ``<attack>@32`` (see ``evaluation.results.merge``). What is done is
    kept in ``unfinished/`` until the end: the same call goes on after a kill.

    Args:
        config: of the run.
        workdir: the run's directory.
        images: of the run.
        asked: what is wanted.
        console: shows a progress bar.
        out: the directory of all that is written; None: the run's own.

    Returns:
        What was written.

    Raises:
        UserError: if there is no checkpoint to evaluate, an attack cannot be made, or another
            process evaluates this run.
    """
    out = out or workdir
    with locked(out, "evaluation"):
        return _evaluate(config, workdir, images, asked, console, out)


def _evaluate(
    config: ConfigDict, workdir: Path, images: Images, asked: Asked, console: Console, out: Path
) -> dict[str, Any]:
    # The run's devices, or as many of them as this machine has.
    mesh = data_mesh(min(config.num_devices, jax.device_count()))
    network, *shapes = build.network_shapes(config, images.shape[-1], len(images.class_names))
    named = named_attacks(config, asked)
    old = results.read_results(out)  # if it is damaged, say so before the work
    last, weights = directory.restore(
        config, workdir, asked.which, replicated_shapes(tuple(shapes), mesh)
    )
    job = _job(config, out, images, asked, network, weights, mesh, console)
    identity = directory.identity(asked.which, weights) | job.identity
    outcomes, settings = {}, {}
    for attack in named:
        for name, found in _run_attack(job, attack).items():
            outcomes[name] = found.outcome
            more = {"examples": len(job.test.labels), "seed": config.seed}
            told = [*attack.warnings, *found.noted.get("warnings", [])]
            settings[name] = {**attack.settings, **more, **found.noted}
            settings[name] |= {"warnings": told} if told else {}
            kept_as = results.placed(old, identity, name, len(job.test.labels))
            _write(job, attack, name, kept_as, found)
        outcomes[attack.name] = outcomes[attack.name]._replace(images=None)
    measured = results.measured(outcomes, settings, network.num_experts, network.num_routers)
    if job.leaving is not None:
        under = exits.summary(outcomes, job.leaving.costs, job.leaving.swept)
        measured["exits"] = job.leaving.as_json() | {"under": under}
        if results.placed(old, identity, "clean", len(job.test.labels)) == "clean":
            _draw_examples(job, outcomes, images.class_names)
    found = _described(config, images, measured, identity, last, mesh)
    found = results.merge(old, found)
    found["warnings"] = [
        *collapse_warnings(found["routing"], "of the test split"),
        *(job.leaving.warnings if job.leaving else []),
        *results.attack_warnings(found["attacks"]),
    ]
    if jax.process_index() == 0:
        results.write_results(out, found)
        _forget([job.state(attack) for attack in named])
    return found


def named_attacks(config: ConfigDict, asked: Asked) -> list[NamedAttack]:
    """The attacks that are asked for; for this no image has to be read.

    Raises:
        UserError: if one of them cannot be.
    """
    protocol, architecture = build.protocol(config), build.architecture(config)
    threat = other_threat(asked.norm, asked.epsilon, protocol.threat)
    named = parse_attacks(asked.attacks, protocol, architecture.parts, threat)
    check_exits(named, architecture.num_exits, "router" in architecture.parts)
    check_processes(named, asked.save_examples)
    return named


def _described(
    config: ConfigDict,
    images: Images,
    measured: Tree,
    identity: Tree,
    last: Weights,
    mesh: Mesh,
) -> dict[str, Any]:
    """What was measured, and what it was measured of."""
    cost = network_cost(build.architecture(config), images.shape, len(images.class_names))
    return {
        "method": config.method,
        "model": config.model.name,
        "dataset": images.name,
        "seed": config.seed,
        "steps": last.step,
        **measured,
        "num_params": cost["params"]["total"],
        "macs_per_image": cost["macs"]["total"],
        "cost": cost,
        "params_sha256": last.sha256,
        "evaluated": identity,
        "warnings": [],  # below: they are of all attacks, those of earlier evaluations too
        **results.provenance(mesh.size),
        "config": json.loads(config.to_json()),
    }


class _Job(NamedTuple):
    """What every attack of an evaluation runs on."""

    network: Network
    weights: Weights
    sha256: str
    test: Split
    indices: np.ndarray
    data: DeviceData
    mesh: Mesh
    batch_size: int
    key: Array
    asked: Asked
    out: Path
    console: Console
    leaving: Leaving | None

    @property
    def identity(self) -> Tree:
        """What results are of besides a checkpoint: the thresholds."""
        return {} if self.leaving is None else {"thresholds": list(self.leaving.thresholds)}

    @property
    def of_network(self) -> tuple[Network, Tree, Tree]:
        return self.network, self.weights.params, self.weights.stats

    def state(self, attack: NamedAttack) -> StateFile:
        """Where the attack's state is kept; under a name that is this job's alone."""
        key = np.asarray(jax.random.key_data(self.key))
        what = attack.name, attack.settings, self.sha256, self.batch_size
        how = self.mesh.size, self.asked.save_examples, self.asked.individual, self.identity
        owner = fingerprint([*what, *how, key, *self.test])
        path = self.out / "unfinished" / f"{attack.name}-{owner[:12]}.npz"
        return StateFile(path if jax.process_count() == 1 else None, owner)


def _job(
    config: ConfigDict,
    out: Path,
    images: Images,
    asked: Asked,
    network: Network,
    weights: Weights,
    mesh: Mesh,
    console: Console,
) -> _Job:
    test = build.subset(images.test, asked.examples)
    sha256, leaving = weights.sha256, None
    if rule := check_rule(config, asked.thresholds):
        leaving = choose(config, images, network, *weights[1:], mesh, rule, asked.thresholds_from)
        stats = with_thresholds(weights.stats, leaving.thresholds)
        weights = weights._replace(stats=replicate(stats, mesh))
    return _Job(
        network=network,
        weights=weights,
        sha256=sha256,
        test=test,
        indices=build.subset_indices(len(images.test.labels), asked.examples),
        data=pipeline.put(test, mesh),
        mesh=mesh,
        batch_size=min(asked.batch_size or config.evaluation.batch_size, len(test.labels)),
        key=build.keys(config.seed).evaluation,
        asked=asked,
        out=out,
        console=console,
        leaving=leaving,
    )


class _Found(NamedTuple):
    """The answers under an attack, which attack succeeded per image, and what is noted beside."""

    outcome: Outcome
    fooled_by: np.ndarray | None
    noted: dict[str, Any]


def _run_attack(job: _Job, attack: NamedAttack) -> dict[str, _Found]:
    """By the attack's name, and by those of whatever it finds besides."""
    try:
        return _run_ensemble(job, attack) if attack.is_ensemble else _run_batchwise(job, attack)
    except ValueError as error:
        raise UserError(f"attack {attack.name!r}: {error}") from None


def _run_batchwise(job: _Job, attack: NamedAttack) -> dict[str, _Found]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    hidden = not job.console.is_terminal
    bar = Progress(*columns, console=job.console, transient=True, disable=hidden)
    row = bar.add_task(attack.name, total=len(job.test.labels))

    def words() -> str:
        done = bar.tasks[0].completed
        return f"{attack.name}: {done:,.0f} of {len(job.test.labels):,} images"

    with bar, heartbeat(job.console, words):
        evaluator = create_evaluator(job.network, attack, job.mesh, job.batch_size)
        outcome = evaluator(
            job.weights.params,
            job.weights.stats,
            job.data,
            job.key,
            warm_up=True,
            advance=partial(bar.advance, row),
            keep_images=job.asked.save_examples and attack.name != "clean",
            state=job.state(attack),
        )
    outside = int(np.sum(outcome.outside))
    told = f"{outside} images left the ball or the pixel range and count as not attacked"
    return {attack.name: _Found(outcome, None, {"warnings": [told]} if outside else {})}


def _run_ensemble(job: _Job, attack: NamedAttack) -> dict[str, _Found]:
    began = time.perf_counter()
    numbers = jnp.arange(len(job.test.labels), dtype=jnp.int32)
    alone = {"individual": True} if job.asked.individual and "autoattack" in attack.name else {}
    with warnings.catch_warnings():  # they are among the results
        warnings.simplefilter("ignore", UserWarning)
        result = attack.run(
            *job.of_network,
            np.asarray(to_float(job.test.images)),
            job.test.labels,
            jax.vmap(partial(jax.random.fold_in, job.key))(numbers),
            batch_size=-(-job.batch_size // job.mesh.size) * job.mesh.size,
            state_file=job.state(attack).path,
            progress=not job.console.quiet,
            mesh=job.mesh,
            **alone,
        )
    network, params, stats = job.of_network
    answers = answer_images(
        *(network, attack.threat, job.mesh, job.batch_size),
        *(params, stats, job.data, result.adversarial),
    )
    answers = answers._replace(seconds=time.perf_counter() - began)
    noted: dict[str, Any] = {
        "parts": {name: _part(report) for name, report in result.attacks.items()},
        "warnings": [*result.warnings, *_of_no_choice(network, attack)],
    }
    if not isinstance(result, MoEResult):
        return {attack.name: _Found(answers, result.fooled_by, noted)}
    # Pathways held fixed have judged, too: what the network itself says stands apart.
    by_network = answers._replace(correct=answers.correct & result.network_robust)
    outcome = answers._replace(correct=result.robust & by_network.correct)
    noted["network_accuracy"] = by_network.accuracy
    found = {attack.name: _Found(outcome, result.fooled_by, noted)}
    if attack.name.startswith("moe"):
        name = attack.name.replace("moe", "moe_network", 1)
        found[name] = _Found(by_network, None, {"judge": "the network"})
    return found


def _of_no_choice(network: Network, attack: NamedAttack) -> list[str]:
    if attack.record.needs == "router" and network.top_k == network.num_experts:
        return [f"all {network.top_k} experts are always chosen: there is no route to change"]
    return []


def _write(job: _Job, attack: NamedAttack, name: str, kept_as: str, found: _Found) -> None:
    """What is kept image by image."""
    if jax.process_index() != 0:
        return
    test, indices = job.test, job.indices
    write_outcome(
        job.out, kept_as, found.outcome, indices, test.labels, job.sha256, found.fooled_by
    )
    if job.asked.save_examples and name == attack.name != "clean":
        write_examples(job.out, kept_as, attack, found.outcome, indices, test.labels)


def _draw_examples(job: _Job, outcomes: dict[str, Outcome], class_names: Sequence[str]) -> None:
    """Examples of each exit's images, if clean images were among what was asked for."""
    if jax.process_index() == 0 and "clean" in outcomes:
        attacked = {name: found for name, found in outcomes.items() if name != "clean"}
        png = examples_by_exit(outcomes["clean"], job.test.images, class_names, attacked)
        write_bytes(job.out / EXIT_EXAMPLES, png)


def _forget(states: Sequence[StateFile]) -> None:
    """Removes the states of these attacks, and no other evaluation's."""
    for path in [state.path for state in states if state.path is not None]:
        for file in path.parent.glob(f"{path.stem}*"):
            file.unlink()
        with suppress(OSError):  # somebody else's are in it, or there never was one
            path.parent.rmdir()


def _part(report: AttackReport) -> dict[str, Any]:
    return {
        "tried": report.tried,
        "fooled": report.fooled,
        "robust_accuracy": report.accuracy,
        **({} if report.alone is None else {"alone": report.alone}),
        "seconds": round(report.seconds, 2),
        "first_call_seconds": round(report.first_call_seconds, 2),
    }
