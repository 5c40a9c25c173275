"""What a comparison's finished runs found, gathered: columns, means over seeds, differences."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import results as results_lib
from advmoe_jax.evaluation.explanation import FILE as EXPLANATION
from advmoe_jax.evaluation.statistics import LEVEL, Estimate, estimate, paired_difference
from advmoe_jax.files import read_json
from advmoe_jax.runs import rows
from advmoe_jax.runs.rows import run_directory, seeds
from advmoe_jax.types import Tree

# Columns of transformers, under the explained attack; docs/vmoe.md says what the slopes are.
_OF_TRANSFORMERS = {
    "prediction_change": "predictions changed %",
    "route_change": "experts exchanged %",
    "next_best": "SA, next best experts %",
    "random": "SA, random experts %",
    "slope": "slope at the images, median",
    "slope_in_ball": "steepest slope in the ball, median",
    "observed": "slope to the attack, median",
    "jump": "largest jump of the margin",
}
FINISHED = "finished.json"
THROUGHPUT = "throughput.json"
# Parts of the network that has all that can be attacked.
_MIXTURE = rows.EVERY_PART


def is_finished(config: ConfigDict, name: str, seed: int, root: Path) -> bool:
    """Whether a run has been trained, evaluated and explained just as the config asks.

    Raises:
        UserError: if the file that says so is damaged.
    """
    workdir = run_directory(root, name, seed)
    said = read_json(workdir / FINISHED)
    if said is None:
        return False
    asked = {key: value for key, value in said.get("asked", {}).items() if key != "remark"}
    found = looked_at(config, workdir, name)
    # Older files do not say what was measured in the end.
    return asked == rows.asked(config, name, seed) and said.get("found", found) == found


def looked_at(config: ConfigDict, workdir: Path, name: str) -> Tree:
    """What a finished row's numbers are of: which weights, and how many images under each attack.

    Somebody may evaluate or explain the run in another way when it is finished.
    """
    results = results_lib.read_results(workdir) or {}
    explanation = read_json(workdir / EXPLANATION) or {}
    attacks = results.get("attacks", {})
    counts = {"clean": config.examples}
    for group, count in (("attacks", config.examples), ("strong_attacks", config.strong_examples)):
        counts |= dict.fromkeys(rows.attacks(config, rows.parts(config, name), group), count)
    names = counts if attacks else {}
    kept = {x: results_lib.name_of_count(results, x, counts[x]) for x in names}
    return {
        "results": results.get("evaluated", {}),
        "explanation": {
            **explanation.get("evaluated", {}),
            "attack": explanation.get("attack", {}).get("name"),
            "examples": explanation.get("examples"),
        },
        "examples": {x: attacks.get(y, {}).get("examples") for x, y in kept.items()},
    }


def columns(config: ConfigDict) -> dict[str, str]:
    """The measured columns: name in ``results.json``, and what it is called."""
    names = rows.attacks(config, _MIXTURE)
    robust = {f"robust_accuracy.{name}": f"RA ({attack_title(name)}) %" for name in names}
    first = attack_title(names[0])
    leaving = {
        f"mean_macs.{name}": f"mean MACs ({words}), millions"
        for name, words in (("clean", "clean"), (names[0], first))
        if any("exits" in rows.parts(config, row) for row in rows.names(config))
    }
    return {
        "standard_accuracy": "SA %",
        **robust,
        **leaving,
        "agreement": f"router agreement ({first}) %",
        **(_OF_TRANSFORMERS if config.run.family == "vit" else {}),
        "images_per_second": "images/s",
    }


def attack_title(name: str) -> str:
    """An attack as a paper calls it."""
    if match := re.fullmatch(r"(ste_)?pgd(\d+)", name):
        return f"PGD-{match[2]}{', straight-through' if match[1] else ''}"
    known = {"autoattack": "AutoAttack", "moe": "MoE suite", "fgsm": "FGSM"}
    known |= {"max_average": "max-average", "exit_suite": "exit suite"}
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
        ``rows``: for each, ``title``, ``about``, ``runs`` by seed, ``estimates`` of each of
        ``columns`` over seeds, ``differences`` from ``reference`` paired by seed (accuracies
        only), ``cost``, ``failed``; ``throughput``, how images/s were measured; then what the
        numbers come from. Accuracies and their differences are shares of 1.
    """
    first = rows.attacks(config, _MIXTURE)[0]
    rates = (read_json(root / THROUGHPUT) or {}).get("images_per_second", {})
    gathered: Tree = {}
    for name in rows.names(config):
        runs = {
            seed: _numbers(config, run_directory(root, name, seed), first)
            | {"images_per_second": rates.get(name, {}).get(str(seed))}
            for seed in seeds(config)
            if is_finished(config, name, seed, root)
        }
        why = (failed or {}).get(name, {})
        row = rows.table(config)[name]
        gathered[name] = {
            "title": row.title,
            "about": row.about,
            "style": dict(row.style),
            "judged": row.judged,
            "runs": runs,
            "failed": {str(seed): text for seed, text in why.items()},
        }
    reference = gathered.get(config.reference, {"runs": {}})["runs"]
    for row in gathered.values():
        row |= _over_seeds(config, row["runs"], reference)
    for row in gathered.values():
        row["runs"] = {str(seed): run for seed, run in row["runs"].items()}
    timed = read_json(root / THROUGHPUT) or {}
    return {
        "columns": columns(config),
        "reference": config.reference,
        "level": LEVEL,
        "seeds": list(seeds(config)),
        "rows": gathered,
        "throughput": {name: timed.get(name) for name in ("batch_size", "device")},
        **results_lib.provenance(config.run.num_devices or jax.device_count()),
        "config": json.loads(config.to_json()),
    }


def _over_seeds(
    config: ConfigDict, runs: Mapping[int, Tree], reference: Mapping[int, Tree]
) -> Tree:
    """Means over seeds, differences from the reference's runs paired by seed, and the cost."""
    estimates, differences = {}, {}
    for column in columns(config):
        values = _by_seed(runs, column)
        estimates[column] = _as_json(estimate(list(values.values())))
        if "accuracy" in column:
            difference = paired_difference(values, _by_seed(reference, column))
            differences[column] = _as_json(difference)
    cost = next((run["cost"] for run in runs.values()), None)
    return {"estimates": estimates, "differences": differences, "cost": cost}


def _numbers(config: ConfigDict, workdir: Path, agreement_under: str) -> Tree:
    """What the comparison takes from one finished run: all of as many images as it asks for."""
    results = results_lib.read_results(workdir)
    explanation = read_json(workdir / EXPLANATION)
    if results is None or explanation is None:
        raise UserError(
            f"{workdir} lacks files of a finished run: remove {workdir / FINISHED} and give the "
            "command again"
        )
    routing = results["routing"] or {}
    strong = rows.attacks(config, _MIXTURE, "strong_attacks")
    usual = ["clean", *rows.attacks(config, _MIXTURE, "attacks")]
    counts = dict.fromkeys(strong, config.strong_examples) | dict.fromkeys(usual, config.examples)
    names = {
        name: results_lib.name_of_count(results, name, count) for name, count in counts.items()
    }
    standard = results.get("standard_accuracy_on_fewer", {})
    robust = results["robust_accuracy"]
    robust = robust | {name: robust[kept] for name, kept in names.items() if kept in robust}
    exits = results.get("exits") or {"under": {}}
    under = exits["under"] | {
        name: exits["under"][kept] for name, kept in names.items() if kept in exits["under"]
    }
    static = {"every": results["cost"]["macs"]["total"]}
    macs = {name: under.get(name, {"macs": static})["macs"]["every"] / 1e6 for name in names}
    return {
        "standard_accuracy": standard.get(names["clean"], results["standard_accuracy"]),
        **{f"robust_accuracy.{name}": accuracy for name, accuracy in robust.items()},
        **{f"mean_macs.{name}": value for name, value in macs.items()},
        "exits": {**exits, "under": under} if under else None,
        "agreement": routing.get("agreement", {}).get(names[agreement_under]),
        **_of_transformer(explanation),
        "cost": results["cost"],
        "attacks": results["attacks"]
        | {x: results["attacks"][y] for x, y in names.items() if y in results["attacks"]},
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


def _of_transformer(explanation: Mapping[str, Any]) -> Tree:
    """The values of ``_OF_TRANSFORMERS``; those that a network does not have are left out."""
    found: Tree = {"prediction_change": explanation.get("prediction_changes")}
    slopes = explanation.get("lipschitz", {})
    for name in ("slope", "slope_in_ball", "observed"):
        if name in slopes:
            found[name] = slopes[name]["median"]
    if "margin" in slopes.get("jumps", {}):
        found["jump"] = slopes["jumps"]["margin"]["largest"]
    if (tokens := explanation.get("tokens")) is not None:
        found["route_change"] = float(np.mean(tokens["changes"]["layers"]))
        for name in ("next_best", "random"):
            found[name] = tokens["exchange"][name]["clean"]["accuracy"]
    return found


def _by_seed(found: Mapping[int, Tree], column: str) -> dict[int, float]:
    return {seed: run[column] for seed, run in found.items() if run.get(column) is not None}


def _as_json(found: Estimate | None) -> Tree | None:
    return None if found is None else found._asdict()
