"""Evaluates a trained run on its test split: ``results.json``, outcomes, adversarial images."""

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax.data import pipeline
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import exits, results
from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.evaluation.certified import certified_agreement
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.evaluation.exit_attacks import check_exits
from advmoe_jax.evaluation.outcomes import write_examples, write_outcome
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.evaluation.wanted import other_threat, parse_attacks
from advmoe_jax.files import StateFile, write_bytes
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.parallel import distributed_shapes, replicate, state_specs
from advmoe_jax.reports.exit_examples import FILE as EXIT_EXAMPLES
from advmoe_jax.reports.exit_examples import examples_by_exit
from advmoe_jax.routing.measures import collapse_warnings
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.attacking import Found, Job, run_attack
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.devices import measuring_mesh
from advmoe_jax.runs.directory import Weights
from advmoe_jax.runs.leaving import Leaving, check_rule, choose
from advmoe_jax.runs.lock import locked
from advmoe_jax.storage import is_remote
from advmoe_jax.training.loop import Stopped
from advmoe_jax.training.preemption import stop_requests
from advmoe_jax.types import Tree


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
        UserError: if there is no checkpoint to evaluate, an attack cannot be made, results of
            other weights of this run would be lost, or another process evaluates this run.
        Stopped: on SIGTERM, after saving.
    """
    out = out or workdir
    with locked(out, "evaluation"), stop_requests({signal.SIGTERM}) as stop_requested:

        def pause() -> None:
            if by := stop_requested():
                raise Stopped(by)

        return _evaluate(config, workdir, images, asked, console, out, pause)


def _evaluate(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    asked: Asked,
    console: Console,
    out: Path,
    pause: Callable[[], None],
) -> dict[str, Any]:
    directory.check_kind(workdir, images.kind)
    mesh = measuring_mesh(config)
    network, *shapes = build.network_shapes(config, images.shape[-1], len(images.class_names))
    named = named_attacks(config, asked)
    old = results.read_results(out)  # if it is damaged, say so before the work
    specs = state_specs(tuple(shapes), network.expert_parameters, mesh)
    like = distributed_shapes(tuple(shapes), specs, mesh)
    last, weights = directory.restore(config, workdir, asked.which, like)
    job, indices, leaving = _work(config, out, images, asked, network, weights, mesh, console)
    job = job._replace(pause=pause)
    identity = directory.identity(asked.which, weights) | job.identity
    results.check_nothing_is_lost(out / results.RESULTS, old, identity, last.sha256)
    if out != workdir:
        _check_place(out, old, config)
    outcomes, settings = {}, {}
    for attack in named:
        for name, found in run_attack(job, attack).items():
            outcomes[name] = found.outcome
            settings[name] = noted(attack, found, len(indices), config.seed)
            kept_as = results.placed(old, identity, name, len(indices))
            _write(job, out, indices, attack, name, kept_as, found)
        outcomes[attack.name] = outcomes[attack.name]._replace(images=None)
    measured = results.measured(outcomes, settings, network.num_experts, network.num_routers)
    threat = build.protocol(config).threat
    certified = certified_agreement(
        network, weights.params, weights.stats, job.split, threat, job.batch_size
    )
    if certified is not None:
        measured["routing"]["certified_agreement"] = certified
        measured["routing"]["certified_within"] = [threat.norm, float(threat.epsilon)]
    if leaving is not None:
        under = exits.summary(outcomes, leaving.costs, leaving.swept)
        measured["exits"] = leaving.as_json() | {"under": under}
        if results.placed(old, identity, "clean", len(indices)) == "clean":
            _draw_examples(job, out, outcomes, images.class_names)
    found = _described(config, images, measured, identity, last, mesh)
    found = results.merge(old, found)
    found["warnings"] = [
        *collapse_warnings(found["routing"], "of the test split"),
        *(leaving.warnings if leaving else []),
        *results.attack_warnings(found["attacks"]),
    ]
    if jax.process_index() == 0:
        results.write_results(out, found)
        _forget([job.state(attack) for attack in named])
    return found


def _check_place(out: Path, old: Tree | None, config: ConfigDict) -> None:
    """Raises UserError if another run's results lie where this one's are to go."""
    there, here = (old or {}).get("config"), json.loads(config.to_json())
    if not isinstance(there, dict):
        return
    for group in ("model", "method", "seed", "attack", "loss", "num_epochs"):
        if there.get(group) != here.get(group):
            raise UserError(
                f"{out} has the results of another run ({group} differs): give another --out"
            )


def named_attacks(config: ConfigDict, asked: Asked) -> list[NamedAttack]:
    """The attacks that are asked for; for this no image has to be read.

    Raises:
        UserError: if one of them cannot be.
    """
    protocol, architecture = build.protocol(config), build.architecture(config)
    threat = other_threat(asked.norm, asked.epsilon, protocol.threat)
    named = parse_attacks(asked.attacks, protocol, architecture.parts, threat)
    check_exits(named, architecture.num_exits, "router" in architecture.parts)
    return named


def noted(attack: NamedAttack, found: Found, examples: int, seed: int) -> dict[str, Any]:
    """What stands beside the numbers of an attack: its settings, on how many images, warnings."""
    told = [*attack.warnings, *found.noted.get("warnings", [])]
    if silent := int(np.sum(found.outcome.predictions == -1)):
        told.append(f"the logits of {silent} images are not numbers: they count as misclassified")
    settings = {**attack.settings, "examples": examples, "seed": seed, **found.noted}
    return settings | ({"warnings": told} if told else {})


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


class _Work(NamedTuple):
    """A job, which images of the test split it is on, and when they leave the network."""

    job: Job
    indices: np.ndarray
    leaving: Leaving | None


def _work(
    config: ConfigDict,
    out: Path,
    images: Images,
    asked: Asked,
    network: Network,
    weights: Weights,
    mesh: Mesh,
    console: Console,
) -> _Work:
    test = build.subset(images.test, asked.examples)
    sha256, leaving = weights.sha256, None
    if rule := check_rule(config, asked.thresholds):
        leaving = choose(config, images, network, *weights[1:], mesh, rule, asked.thresholds_from)
        stats = with_thresholds(weights.stats, leaving.thresholds)
        weights = weights._replace(stats=replicate(stats, mesh))
    job = Job(
        network=network,
        params=weights.params,
        stats=weights.stats,
        sha256=sha256,
        split=test,
        data=pipeline.put(test, mesh),
        mesh=mesh,
        batch_size=min(asked.batch_size or config.evaluation.batch_size, len(test.labels)),
        key=build.keys(config.seed).evaluation,
        console=console,
        keep_images=asked.save_examples,
        individual=asked.individual,
        identity={} if leaving is None else {"thresholds": list(leaving.thresholds)},
        folder=out / "unfinished",
    )
    return _Work(job, build.subset_indices(len(images.test.labels), asked.examples), leaving)


def _write(
    job: Job,
    out: Path,
    indices: np.ndarray,
    attack: NamedAttack,
    name: str,
    kept_as: str,
    found: Found,
) -> None:
    """What is kept image by image."""
    if jax.process_index() != 0:
        return
    labels = job.split.labels
    write_outcome(out, kept_as, found.outcome, indices, labels, job.sha256, found.fooled_by)
    if job.keep_images and name == attack.name != "clean":
        write_examples(out, kept_as, attack, found.outcome, indices, labels)


def _draw_examples(
    job: Job, out: Path, outcomes: dict[str, Outcome], class_names: Sequence[str]
) -> None:
    """Examples of each exit's images, if clean images were among what was asked for."""
    if jax.process_index() == 0 and "clean" in outcomes:
        attacked = {name: found for name, found in outcomes.items() if name != "clean"}
        png = examples_by_exit(outcomes["clean"], job.split.images, class_names, attacked)
        write_bytes(out / EXIT_EXAMPLES, png)


def _forget(states: Sequence[StateFile]) -> None:
    """Removes the states of these attacks, and no other evaluation's."""
    for path in [state.path for state in states if state.path is not None]:
        for file in path.parent.glob(f"{path.stem}*"):
            file.unlink()
        if not is_remote(path):
            with suppress(OSError):  # somebody else's are in it, or there never was one
                path.parent.rmdir()
