"""A comparison: every row is trained, evaluated and explained for several seeds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import results as results_lib
from advmoe_jax.evaluation import throughput
from advmoe_jax.evaluation.cost import keep_for, network_cost
from advmoe_jax.files import read_json, write_json
from advmoe_jax.metrics import METRICS, read_metrics
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.parallel import data_mesh
from advmoe_jax.reports import write_report
from advmoe_jax.runs import build, directory, rows, training
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.evaluating import Asked, evaluate
from advmoe_jax.runs.explaining import explain
from advmoe_jax.runs.gathering import FINISHED, THROUGHPUT, gather, is_finished, looked_at
from advmoe_jax.runs.lock import locked
from advmoe_jax.runs.mappings import make_room
from advmoe_jax.runs.rehearsal import rehearse
from advmoe_jax.runs.rows import run_directory, seeds
from advmoe_jax.training.loop import Diverged
from advmoe_jax.types import Tree


def compare(
    config: ConfigDict,
    root: Path,
    console: Console,
    on_seed: Callable[[Tree], Any] = lambda found: None,
) -> Tree:
    """Runs what is not done yet, seed by seed, so that a cut comparison has whole seeds to show.

    Args:
        config: of the comparison, checked.
        root: its directory; runs that it holds and that are finished are not touched.
        console: where people read.
        on_seed: called after each seed with what was gathered so far.

    Returns:
        What ``gathering.gather`` returns.

    Raises:
        UserError: if a run cannot be trained or evaluated as the config says, the directory is a
            run's, or another process is at it. One that diverges is
            noted, and so are those that build on it; the rest goes on.
        loop.Stopped: on SIGTERM or SIGINT, after saving.
    """
    with locked(root, "comparison"):
        directory.claim_for_comparison(root, config)
        return _compare(config, root, console, on_seed)


def _compare(
    config: ConfigDict, root: Path, console: Console, on_seed: Callable[[Tree], Any]
) -> Tree:
    table = rows.table(config)
    first = seeds(config)[0]
    for name in rows.names(config):  # a mistake in the last row must not wait for the first
        rehearse(rows.run_config(config, name, first, config.sparse_keep or 0.5, root))
    keep: float | None = None
    failed: dict[str, dict[int, str]] = {}
    for seed in seeds(config):
        images: Images | None = None
        for name in rows.names(config):
            workdir = run_directory(root, name, seed)
            if is_finished(config, name, seed, root):
                continue
            if seed in failed.get(table[name].builds_on, {}):
                needed = table[table[name].builds_on].title
                failed.setdefault(name, {})[seed] = f"it builds on {needed}, which did not end"
                continue
            if images is None:  # all rows of a seed share them
                images = build.load_images(_of_seed(config, seed))
                for wanted in rows.names(config):
                    changes = table[wanted].changes
                    build.check_classes(config_lib.with_changes(config.run, changes), images)
            if keep is None and rows.is_sparse(config, name):
                keep = config.sparse_keep or keep_of_equal_cost(config, images)
            run = rows.run_config(config, name, seed, keep, root)
            text = f"\n{table[name].title}, seed {seed}, in {workdir}"
            console.print(text, soft_wrap=True, highlight=False)
            make_room()
            try:
                workdir = directory.create(str(workdir))
                with locked(workdir, "training"):
                    _finish(config, name, run, workdir, images, console)
            except Diverged as error:
                failed.setdefault(name, {})[seed] = str(error)
                console.print(f"warning: {error}", soft_wrap=True, highlight=False)
        try:
            _measure_throughput(config, root, images)
        except UserError as error:  # the runs may have been moved here without data or weights
            console.print(f"images/s not measured: {error}", soft_wrap=True, highlight=False)
        found = gather(config, root, failed)
        on_seed(found)
    return found


def _finish(
    config: ConfigDict,
    name: str,
    run: ConfigDict,
    workdir: Path,
    images: Images,
    console: Console,
) -> None:
    """Trains, evaluates and explains one run, from wherever it was cut off."""
    directory.claim(workdir, run)
    training.train(run, workdir, images, console)
    parts = build.architecture(run).parts
    examples = len(build.subset(images.test, config.strong_examples).labels)
    for attack in rows.attacks(config, parts, "strong_attacks"):
        if not _is_measured(workdir, attack, examples):
            evaluate(run, workdir, images, Asked(attack, examples), console)
    # Last, and always: this is what ends with the standard accuracy and the agreement.
    attacks = ",".join(rows.attacks(config, parts, "attacks"))
    evaluate(run, workdir, images, Asked(attacks, config.examples), console)
    explain(
        run,
        workdir,
        images,
        attack=config.explained_attack,
        examples=config.explained_examples,
    )
    write_report(workdir)
    if jax.process_count() == 1:
        directory.close(run, workdir)
    found = looked_at(config, workdir, name)
    write_json(workdir / FINISHED, {"asked": rows.asked(config, name, run.seed), "found": found})


def _measure_throughput(config: ConfigDict, root: Path, images: Images | None) -> None:
    """Times inference of all finished runs side by side, unless that is done for just these."""
    runs_of = {
        (name, seed): run_directory(root, name, seed)
        for name in rows.names(config)
        for seed in seeds(config)
        if is_finished(config, name, seed, root)
    }
    weights: dict[str, dict[str, str]] = {}
    for (name, seed), workdir in runs_of.items():
        sha256 = (results_lib.read_results(workdir) or {}).get("evaluated", {}).get("params_sha256")
        weights.setdefault(name, {})[str(seed)] = sha256
    if not weights or (read_json(root / THROUGHPUT) or {}).get("weights") == weights:
        return
    if images is None:
        images = build.load_images(_of_seed(config, config.run.seed))
    mesh = data_mesh(min(config.run.num_devices, jax.device_count()))
    wanted = min(config.run.evaluation.batch_size, len(images.test.labels))
    size = max(wanted // mesh.size, 1) * mesh.size
    batch = np.asarray(images.test.images[np.arange(size)])  # they may be decoded only here
    rates = throughput.images_per_second(
        {run: _evaluated_network(workdir, images) for run, workdir in runs_of.items()},
        batch,
        mesh,
    )
    by_row: dict[str, dict[str, float]] = {name: {} for name in weights}
    for (name, seed), rate in rates.items():
        by_row[name][str(seed)] = rate
    found = {
        "images_per_second": by_row,
        "batch_size": len(batch),
        "weights": weights,
        **results_lib.provenance(mesh.size),
    }
    write_json(root / THROUGHPUT, found)


def _evaluated_network(workdir: Path, images: Images) -> tuple[Network, Tree, Tree]:
    """The network of a run, with the thresholds that it was evaluated with."""
    network, params, stats = directory.restore_network(
        directory.read_config(workdir), workdir, images
    )
    if found := (results_lib.read_results(workdir) or {}).get("exits"):
        stats = with_thresholds(stats, np.array(found["thresholds"]))
    return network, params, stats


def _is_measured(workdir: Path, attack: str, examples: int) -> bool:
    """Whether the results have this attack on the parameters that training ended with."""
    results = results_lib.read_results(workdir) or {}
    epochs = read_metrics(workdir / METRICS)
    if not epochs or results.get("steps") != epochs[-1]["step"]:
        return False
    name = results_lib.name_of_count(results, attack, examples)
    return (
        results["evaluated"]["checkpoint"] == "best"
        and results["attacks"].get(name, {}).get("examples") == examples
        and name in results["robust_accuracy"]
    )


def _of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    run = ConfigDict(json.loads(config.run.to_json()))
    run.seed = seed
    return run


def keep_of_equal_cost(config: ConfigDict, images: Images) -> float:
    """The share of channels with which the Sparse network costs at most what the mixture does."""
    model, classes = build.architecture(config.run), len(images.class_names)
    macs = network_cost(model, images.shape, classes)["macs"]
    return keep_for(model.dense(), images.shape, classes, macs["total"] / macs["dense"])
