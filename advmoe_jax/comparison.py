"""The paper's table: methods as rows, trained and evaluated for several seeds.

Every row of every seed is an ordinary run directory, ``<row>/seed<k>``. Rows differ from the
comparison's ``config.run`` in what ``ROWS`` says and in nothing else.

The dissection (Zhang et al., ICCV 2023, section 4: what does a robust router, what do robust
experts contribute?) takes the mixture of ``standard_moe``, trained on clean images, and trains one
half of it robustly while the other stays as it is, parameters and statistics. The load of that
mixture is balanced (importance loss): the router of a collapsed one decides nothing.

- *robust router only* (``robust_router``): the experts are those of ``standard_moe``; the router is
  trained from there by AdvMoE's router update with the paper's objective (TRADES' loss through the
  gate), since the published code's class-to-expert assignment would pay no heed to what these
  experts have learned;
- *robust experts only* (``robust_experts``): the router is that of ``standard_moe``; the experts
  are trained from there by AdvMoE's expert update, gradients clipped: what is sure of clean images
  is so wrong about attacked ones that the first steps would throw it back to chance.

Both are attacked as a whole network by the same attacks as all other rows.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax import experiment, runs
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import results as results_lib
from advmoe_jax.evaluation import suite, throughput
from advmoe_jax.evaluation.cost import keep_for, network_cost
from advmoe_jax.evaluation.explanation import FILE as EXPLANATION
from advmoe_jax.evaluation.explanation import explained_attack
from advmoe_jax.evaluation.statistics import LEVEL, Estimate, estimate, paired_difference
from advmoe_jax.metrics import METRICS, read_metrics
from advmoe_jax.parallel import data_mesh
from advmoe_jax.reports import write_report
from advmoe_jax.reports.figures import BLUE, COLOURS, GREEN, PURPLE, VERMILION
from advmoe_jax.training.loop import Diverged

Tree = dict[str, Any]

SCHEMA: dict[str, Any] = {
    "rows": str,
    "num_seeds": int,
    "attacks": str,
    "examples": int,
    "strong_attacks": str,
    "strong_examples": int,
    "explained_attack": str,
    "explained_examples": int,
    "sparse_keep": float,
    "run": config_lib.SCHEMA,
}
FINISHED = "finished.json"
THROUGHPUT = "throughput.json"


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        title: as the table has it.
        about: what is done, in a few words.
        changes: values of ``config.run`` that are this row's own, by dotted name.
        builds_on: the row whose run of the same seed this one starts from; empty: none.
        path: the config value that takes that run's directory.
        style: settings of matplotlib's plot; colour, marker and line together tell rows apart, with
            any colour blindness and in grey. Empty: the reports choose.
        judged: whether a verdict against the reference is written of it.
    """

    title: str
    about: str
    changes: Mapping[str, Any]
    builds_on: str = ""
    path: str = ""
    style: Mapping[str, Any] = MappingProxyType({})
    judged: bool = False


_DENSE = {"method": "trades", "model.num_experts": 1}
_ADVMOE = {"method": "advmoe", "loss.router_objective": "pathway"}
ROWS = {
    "at_dense": Row(
        "AT (Dense)",
        "the dense network, adversarial training with TRADES' loss, as in the paper",
        {**_DENSE, "model.ratio": 1.0},
        style={"color": "black", "marker": "o", "linestyle": "-"},
    ),
    "at_s_dense": Row(
        "AT (S-Dense)",
        "the dense network at the width of one pathway",
        _DENSE,
        style={"color": COLOURS[7], "marker": "s", "linestyle": "--"},
    ),
    "at_sparse": Row(
        "AT (Sparse)",
        "channels of AT (Dense) pruned to the mixture's MACs, HYDRA's way, and trained on",
        {**_DENSE, "method": "hydra", "model.ratio": 1.0},
        "at_dense",
        "pruning.dense_run",
        style={"color": COLOURS[5], "marker": "^", "linestyle": "--"},
    ),
    "at_moe": Row(
        "AT (MoE)",
        "the mixture, router and experts in one optimizer step",
        {"method": "joint"},
        style={"color": GREEN, "marker": "D", "linestyle": "-"},
    ),
    "advmoe_assignment": Row(
        "AdvMoE, assignment",
        "experts and router in turn; the router learns to send class y to expert y mod N, as in "
        "the published code",
        {**_ADVMOE, "loss.router_objective": "assignment"},
        style={"color": VERMILION, "marker": "o", "linestyle": "-", "linewidth": 2.2},
        judged=True,
    ),
    "advmoe_pathway": Row(
        "AdvMoE, pathway",
        "experts and router in turn; the router learns TRADES' loss through its gate, as in the "
        "paper",
        _ADVMOE,
        style={"color": BLUE, "marker": "*", "linestyle": "-", "linewidth": 2.2},
        judged=True,
    ),
    "standard_moe": Row(
        "Standard (MoE)",
        "the mixture, trained on clean images, its load balanced; the dissection starts from it",
        {"method": "standard", "loss.awp": 0.0, "balance.importance": 5.0},
        style={"color": COLOURS[4], "marker": "v", "linestyle": ":"},
    ),
    "robust_router": Row(
        "Robust router only",
        "the experts of Standard (MoE) as they are; its router trained on robustly",
        {**_ADVMOE, "start.frozen": "experts"},
        "standard_moe",
        "start.run",
        style={"color": PURPLE, "marker": "P", "linestyle": ":"},
    ),
    "robust_experts": Row(
        "Robust experts only",
        "the router of Standard (MoE) as it is; its experts trained on robustly",
        {**_ADVMOE, "start.frozen": "router", "optimizer.experts.clip_norm": 1.0},
        "standard_moe",
        "start.run",
        style={"color": COLOURS[6], "marker": "X", "linestyle": ":"},
    ),
}
REFERENCE = "at_dense"


def check(config: ConfigDict) -> None:
    """Raises UserError unless every value of the comparison can be used."""
    config_lib.check(config, SCHEMA)
    if config.num_seeds < 1:
        raise UserError(f"config.num_seeds={config.num_seeds} must be at least 1")
    for name in ("examples", "strong_examples", "explained_examples"):
        if config[name] < 0:
            raise UserError(f"config.{name}={config[name]} must not be negative; 0 means all")
    if config.run.model.num_experts < 2 or config.run.model.keep != 1:
        raise UserError(
            "config.run.model is that of the mixture: it needs num_experts=2 or more and keep=1; "
            "the rows of dense and Sparse networks follow from it"
        )
    rows = row_names(config)
    for name in rows:
        needed = ROWS[name].builds_on
        if needed and needed not in rows:
            raise UserError(f"row {name!r} starts from the runs of {needed!r}: add it to rows")
    if not attack_names(config, is_moe=True):
        raise UserError("config.attacks names no attack: name one, such as pgd50")
    explained_attack(config.explained_attack, config.run, is_moe=False)


def row_names(config: ConfigDict) -> list[str]:
    """The rows that are wanted, in the order in which they are run.

    Raises:
        UserError: if one is unknown.
    """
    wanted = {name.strip() for name in config.rows.split(",") if name.strip()}
    if unknown := sorted(wanted - ROWS.keys()):
        raise UserError(f"row {unknown[0]!r} is unknown; choose from {', '.join(ROWS)}")
    if not wanted:
        raise UserError(f"config.rows names no row; choose from {', '.join(ROWS)}")
    return [name for name in ROWS if name in wanted]


def seeds(config: ConfigDict) -> range:
    """The seeds of the runs."""
    return range(config.run.seed, config.run.seed + config.num_seeds)


def attack_names(config: ConfigDict, is_moe: bool, which: str = "") -> list[str]:
    """The attacks of a row; those on a router are left out for a network that has none.

    Args:
        config: of the comparison.
        is_moe: whether the row's networks have a router.
        which: ``attacks`` or ``strong_attacks``; empty: both.

    Raises:
        UserError: if a name is unknown.
    """
    text = ",".join(config[name] for name in ([which] if which else ["attacks", "strong_attacks"]))
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "clean")]
    suite.parse_attacks(",".join(names), config.run, True)
    if is_moe:
        return names

    def applies(name: str) -> bool:
        try:
            suite.parse_attacks(name, config.run, False)
        except UserError:  # known, as we saw, so it is the router that is missing
            return False
        return True

    return [name for name in names if applies(name)]


def run_config(config: ConfigDict, name: str, seed: int, keep: float, root: Path) -> ConfigDict:
    """The whole config of one run of the comparison.

    Args:
        config: of the comparison.
        name: of the row.
        seed: of the run.
        keep: share of channels of the Sparse row.
        root: directory of the comparison.
    """
    row, run = ROWS[name], ConfigDict(json.loads(config.run.to_json()))
    changes = {"seed": seed, **row.changes}
    if row.changes["method"] == "hydra":
        changes["model.keep"] = keep
    if row.builds_on:
        changes[row.path] = str(run_directory(root, row.builds_on, seed))
    is_moe = changes.get("model.num_experts", run.model.num_experts) > 1
    changes["evaluation.attacks"] = ",".join(attack_names(config, is_moe))
    with run.ignore_type():
        for path, value in changes.items():
            *groups, last = path.split(".")
            group = run
            for part in groups:
                group = group[part]
            group[last] = value
    config_lib.check(run)
    return run


def run_directory(root: Path, name: str, seed: int) -> Path:
    """Where a run of the comparison lies."""
    return root / name / f"seed{seed}"


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
        What ``gather`` returns.

    Raises:
        UserError: if a run cannot be trained or evaluated as the config says. One that diverges is
            noted, and so are those that build on it; the rest goes on.
        loop.Stopped: on SIGTERM, after saving.
    """
    keep: float | None = None
    failed: dict[str, dict[int, str]] = {}
    for seed in seeds(config):
        images: experiment.Images | None = None
        for name in row_names(config):
            workdir = run_directory(root, name, seed)
            if is_finished(config, name, seed, root):
                continue
            if seed in failed.get(ROWS[name].builds_on, {}):
                needed = ROWS[ROWS[name].builds_on].title
                failed.setdefault(name, {})[seed] = f"it builds on {needed}, which did not end"
                continue
            if images is None:  # all rows of a seed share them
                images = experiment.load_images(_of_seed(config, seed))
            if keep is None:
                keep = config.sparse_keep or _keep_of_equal_cost(config, images)
            run = run_config(config, name, seed, keep, root)
            text = f"\n{ROWS[name].title}, seed {seed}, in {workdir}"
            console.print(text, soft_wrap=True, highlight=False)
            try:
                _finish(config, name, run, experiment.create_workdir(str(workdir)), images, console)
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
    images: experiment.Images,
    console: Console,
) -> None:
    """Trains, evaluates and explains one run, from wherever it was cut off."""
    runs.claim(workdir, run)
    runs.train(run, workdir, images, console)
    is_moe = run.model.num_experts > 1
    examples = len(experiment.subset(images.test, config.strong_examples).labels)
    for attack in attack_names(config, is_moe, "strong_attacks"):
        if not _is_measured(workdir, attack, examples):
            experiment.evaluate(
                run, workdir, images, attacks=attack, examples=examples, console=console
            )
    # Last, for the standard accuracy is that of the images of the latest evaluation.
    attacks = ",".join(attack_names(config, is_moe, "attacks"))
    experiment.evaluate(
        run, workdir, images, attacks=attacks, examples=config.examples, console=console
    )
    runs.explain(
        run,
        workdir,
        images,
        attack=config.explained_attack,
        examples=config.explained_examples,
    )
    write_report(workdir)
    if jax.process_count() == 1:
        experiment.close(run, workdir)
    results_lib.write_json(workdir / FINISHED, {"asked": _asked(config, name, run.seed)})


def _measure_throughput(config: ConfigDict, root: Path, images: experiment.Images | None) -> None:
    """Times inference of all finished runs side by side, unless that is done for just these."""
    runs_of = {
        (name, seed): run_directory(root, name, seed)
        for name in row_names(config)
        for seed in seeds(config)
        if is_finished(config, name, seed, root)
    }
    weights: dict[str, dict[str, str]] = {}
    for (name, seed), workdir in runs_of.items():
        sha256 = (results_lib.read_results(workdir) or {}).get("evaluated", {}).get("params_sha256")
        weights.setdefault(name, {})[str(seed)] = sha256
    if not weights or (results_lib.read_json(root / THROUGHPUT) or {}).get("weights") == weights:
        return
    if images is None:
        images = experiment.load_images(_of_seed(config, config.run.seed))
    mesh = data_mesh(min(config.run.num_devices, jax.device_count()))
    wanted = min(config.run.evaluation.batch_size, len(images.test.labels))
    size = max(wanted // mesh.size, 1) * mesh.size
    batch = np.asarray(images.test.images[np.arange(size)])  # they may be decoded only here
    rates = throughput.images_per_second(
        {
            run: experiment.restore(config_lib.load(workdir / "config.json"), workdir, images)
            for run, workdir in runs_of.items()
        },
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
    results_lib.write_json(root / THROUGHPUT, found)


def _is_measured(workdir: Path, attack: str, examples: int) -> bool:
    """Whether the results have this attack on the parameters that training ended with."""
    results = results_lib.read_results(workdir) or {}
    epochs = read_metrics(workdir / METRICS)
    done = results.get("attacks", {}).get(attack, {})
    return (
        bool(epochs)
        and results.get("steps") == epochs[-1]["step"]
        and results["evaluated"]["checkpoint"] == "best"
        and done.get("examples") == examples
        and attack in results["robust_accuracy"]
    )


def is_finished(config: ConfigDict, name: str, seed: int, root: Path) -> bool:
    """Whether a run has been trained, evaluated and explained just as the config asks.

    Raises:
        UserError: if the file that says so is damaged.
    """
    said = results_lib.read_json(run_directory(root, name, seed) / FINISHED)
    return said is not None and said.get("asked") == _asked(config, name, seed)


def _asked(config: ConfigDict, name: str, seed: int) -> Tree:
    """All that a run's numbers follow from, in JSON; wherever its data lie."""
    asked = json.loads(config.to_json())
    asked["run"] |= {"seed": seed}
    asked["run"]["data"]["path"] = Path(config.run.data.path).name
    del asked["rows"], asked["num_seeds"]
    return asked | {"row": dict(ROWS[name].changes)}


def _of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    run = ConfigDict(json.loads(config.run.to_json()))
    run.seed = seed
    return run


def _keep_of_equal_cost(config: ConfigDict, images: experiment.Images) -> float:
    """The share of channels with which the Sparse network costs at most what the mixture does."""
    model, shape = config.run.model, images.test.images.shape[1:]
    classes = len(images.class_names)
    macs = network_cost(model, shape, classes)["macs"]
    dense = ConfigDict({**model.to_dict(), "num_experts": 1, "ratio": 1.0, "top_k": 1})
    return keep_for(dense, shape, classes, macs["total"] / macs["dense"])


# --------------------------------------------------------------------------------- what was found


def columns(config: ConfigDict) -> dict[str, str]:
    """The measured columns: name in ``results.json``, and what it is called."""
    names = attack_names(config, is_moe=True)
    robust = {f"robust_accuracy.{name}": f"RA ({attack_title(name)}) %" for name in names}
    first = attack_title(names[0])
    return {
        "standard_accuracy": "SA %",
        **robust,
        "agreement": f"router agreement ({first}) %",
        "images_per_second": "images/s",
    }


def attack_title(name: str) -> str:
    """An attack as a paper calls it."""
    if match := re.fullmatch(r"(ste_)?pgd(\d+)", name):
        return f"PGD-{match[2]}{', straight-through' if match[1] else ''}"
    known = {"autoattack": "AutoAttack", "moe": "MoE suite", "fgsm": "FGSM"}
    return known.get(name, name)


def gather(
    config: ConfigDict, root: Path, failed: Mapping[str, Mapping[int, str]] | None = None
) -> Tree:
    """The content of the comparison's ``results.json``, from the runs that are finished.

    Args:
        config: of the comparison.
        root: its directory.
        failed: why a run of a row did not end, by seed.

    Returns:
        ``rows``: for each, ``title``, ``about``, ``style``, ``judged``, ``runs`` by seed,
        ``estimates`` of each of ``columns`` over seeds, ``differences`` from ``reference`` paired
        by seed (accuracies only), ``cost``, ``failed``; ``throughput``, how images/s were measured;
        then what the numbers come from. Accuracies and their differences are shares of 1.
    """
    first = attack_names(config, is_moe=True)[0]
    timed = results_lib.read_json(root / THROUGHPUT) or {}
    rates = timed.get("images_per_second", {})
    rows: Tree = {
        name: {
            "title": ROWS[name].title,
            "about": ROWS[name].about,
            "style": dict(ROWS[name].style),
            "judged": ROWS[name].judged,
            "runs": {
                seed: _numbers(run_directory(root, name, seed), first)
                | {"images_per_second": rates.get(name, {}).get(str(seed))}
                for seed in seeds(config)
                if is_finished(config, name, seed, root)
            },
            "failed": {str(seed): why for seed, why in (failed or {}).get(name, {}).items()},
        }
        for name in row_names(config)
    }
    reference = rows.get(REFERENCE, {"runs": {}})["runs"]
    for row in rows.values():
        found = row["runs"]
        row["estimates"] = {}
        row["differences"] = {}
        for column in columns(config):
            values = _by_seed(found, column)
            row["estimates"][column] = _as_json(estimate(list(values.values())))
            if "accuracy" in column:
                difference = paired_difference(values, _by_seed(reference, column))
                row["differences"][column] = _as_json(difference)
        row["cost"] = next((run["cost"] for run in found.values()), None)
        row["runs"] = {str(seed): run for seed, run in found.items()}
    return {
        "columns": columns(config),
        "reference": REFERENCE,
        "level": LEVEL,
        "seeds": list(seeds(config)),
        "rows": rows,
        "throughput": {name: timed.get(name) for name in ("batch_size", "device")},
        **results_lib.provenance(config.run.num_devices or jax.device_count()),
        "config": json.loads(config.to_json()),
    }


def _numbers(workdir: Path, agreement_under: str) -> Tree:
    """What the comparison takes from one finished run."""
    results = results_lib.read_results(workdir)
    explanation = results_lib.read_json(workdir / EXPLANATION)
    if results is None or explanation is None:
        raise UserError(
            f"{workdir} lacks files of a finished run: remove {workdir / FINISHED} and give the "
            "command again"
        )
    routing = results["routing"] or {}
    robust = {f"robust_accuracy.{name}": x for name, x in results["robust_accuracy"].items()}
    return {
        "standard_accuracy": results["standard_accuracy"],
        **robust,
        "agreement": routing.get("agreement", {}).get(agreement_under),
        "cost": results["cost"],
        "attacks": results["attacks"],
        "curve": explanation["curve"],
        "routing": explanation["routing"],
        "class_names": explanation["class_names"],
        "dataset": results["dataset"],
        "model": results["model"],
        "steps": results["steps"],
        "evaluated": results["evaluated"],
        "warnings": results["warnings"],
        "device": results["device"],
        "git_commit": results["git_commit"],
    }


def _by_seed(found: Mapping[int, Tree], column: str) -> dict[int, float]:
    return {seed: run[column] for seed, run in found.items() if run.get(column) is not None}


def _as_json(found: Estimate | None) -> Tree | None:
    return None if found is None else found._asdict()
