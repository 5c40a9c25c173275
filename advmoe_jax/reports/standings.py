"""What many directories hold, runs and comparisons, gathered into lines of one table.

Everything that is read may be a stranger's: a value of another kind than ours is left out.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.evaluation.statistics import Estimate, estimate
from advmoe_jax.reports.table import as_mapping, is_number

# What may differ between runs of one line: the seed, and on how many devices they ran; of data
# where they lie, not how they are called; of a run to start from all but that there is one.
_FREE = ("seed", "num_devices", "expert_shards")
_DATA = ("data.path", "data.extra_path")
_STARTS = ("start.run", "pruning.dense_run")


class Attack(NamedTuple):
    """What makes robust accuracies comparable: the name without a count, and the ball."""

    name: str
    norm: str
    epsilon: float | None


class Measured(NamedTuple):
    """A robust accuracy of one run.

    Attributes:
        accuracy: a share of 1.
        examples: number of images; None: not recorded.
        settings: of the attack, as the run recorded them.
    """

    accuracy: float
    examples: int | None
    settings: Mapping[str, Any]


class Entry(NamedTuple):
    """One run.

    Attributes:
        name: of its directory, or the row's title.
        place: the directory of the comparison; empty for a run of its own.
        group: runs of equal groups differ in their seed alone.
        facts: ``method``, ``model``, ``dataset``, ``seed``, ``commit``, ``device``, ``system``,
            as text.
        numbers: ``standard_accuracy`` (a share), ``macs`` and ``mean_macs`` per image, ``params``,
            ``images_per_second``; those that there are.
        clean_examples: number of images of the standard accuracy; None: not recorded.
        robust: by attack.
        sha256: of the parameters that were evaluated.
    """

    name: str
    place: str
    group: str
    facts: dict[str, str]
    numbers: dict[str, float]
    clean_examples: int | None
    robust: dict[Attack, Measured]
    sha256: str


class Line(NamedTuple):
    """Runs that differ in their seed alone, as one line of the table."""

    entries: tuple[Entry, ...]

    def mean(self, column: str) -> Estimate | None:
        """The mean of one of the entries' ``numbers`` over seeds; None if no run has it."""
        return estimate([x.numbers[column] for x in self.entries if column in x.numbers])

    def robust(self, attack: Attack) -> Estimate | None:
        """The mean robust accuracy over seeds; None if no run has it."""
        return estimate([x.robust[attack].accuracy for x in self.entries if attack in x.robust])

    def facts(self, name: str) -> list[str]:
        """The different values of a fact, in the order of the runs."""
        values = (x.facts.get(name, "") for x in self.entries)
        return [value for value in dict.fromkeys(values) if value]


def collect(directories: Iterable[Path]) -> tuple[list[Line], list[str]]:
    """The lines of a table of runs and comparisons, and what was left out, a sentence each.

    Args:
        directories: of runs, and of comparisons, whose rows then have a line each; plain files
            among them are passed over.

    Raises:
        UserError: if one of them does not exist, or none holds results.
    """
    entries: list[Entry] = []
    left_out: list[str] = []
    for directory in directories:
        if not directory.exists():
            raise UserError(f"{directory}: there is no such directory")
        if not directory.is_dir():
            continue
        try:
            found = _entries(directory)
        except UserError as error:
            left_out.append(f"{error} (left out)")
            continue
        entries += found
        if not found:
            left_out.append(f"{directory} holds no results (left out)")
    if not entries:
        reason = "; ".join(left_out) or "these are no directories"
        raise UserError(f"there is nothing to show: {reason}")
    return _lines(entries, left_out), left_out


def _entries(directory: Path) -> list[Entry]:
    found = read_results(directory)
    if found is None or "rows" in found:
        return _of_comparison(directory, found or {})
    group = str(directory)  # a run that does not say its config is a line of its own
    if config := as_mapping(found.get("config")):
        which = as_mapping(found.get("evaluated")).get("checkpoint")
        rule = as_mapping(found.get("exits")).get("rule")
        content = [_without_places(config), which, found.get("dataset"), rule]
        group = json.dumps(content, sort_keys=True)
    speed = as_mapping(found.get("images_per_second")).get("clean")
    return [_entry(str(directory), "", group, found, speed)]


def _of_comparison(directory: Path, found: Mapping[str, Any]) -> list[Entry]:
    entries = []
    for name, row in as_mapping(found.get("rows")).items():
        row = as_mapping(row)
        for seed, run in as_mapping(row.get("runs")).items():
            run = dict(as_mapping(run))
            run["seed"] = seed
            run["robust_accuracy"] = {
                key.removeprefix("robust_accuracy."): value
                for key, value in run.items()
                if key.startswith("robust_accuracy.")
            }
            title, place = str(row.get("title") or name), str(directory)
            speed = run.get("images_per_second")
            entries.append(_entry(title, place, json.dumps([place, name]), run, speed))
    return entries


def _entry(name: str, place: str, group: str, found: Mapping[str, Any], speed: Any) -> Entry:
    """One run, from the content of its ``results.json``, or what a comparison has of it."""
    macs = as_mapping(as_mapping(found.get("cost")).get("macs"))
    params = as_mapping(as_mapping(found.get("cost")).get("params"))
    under = as_mapping(as_mapping(found.get("exits")).get("under"))
    numbers = {
        "standard_accuracy": found.get("standard_accuracy"),
        "macs": found.get("macs_per_image", macs.get("total")),
        "mean_macs": as_mapping(as_mapping(under.get("clean")).get("macs")).get("every"),
        "params": found.get("num_params", params.get("total")),
        "images_per_second": speed,
    }
    clean = as_mapping(as_mapping(found.get("attacks")).get("clean"))
    facts = {key: found.get(key) for key in ("method", "model", "dataset", "seed", "device")}
    facts |= {"commit": found.get("git_commit"), "system": _system(found, macs)}
    return Entry(
        name=name,
        place=place,
        group=group,
        facts={key: str(value) for key, value in facts.items() if value is not None},
        numbers={key: float(value) for key, value in numbers.items() if is_number(value)},
        clean_examples=_count(clean.get("examples")),
        robust=_robust(found),
        sha256=str(as_mapping(found.get("evaluated")).get("params_sha256") or ""),
    )


def _robust(found: Mapping[str, Any]) -> dict[Attack, Measured]:
    """Robust accuracies by attack, each on the most images that there are."""
    robust: dict[Attack, Measured] = {}
    for name, accuracy in as_mapping(found.get("robust_accuracy")).items():
        settings = as_mapping(as_mapping(found.get("attacks")).get(name))
        if not is_number(accuracy):
            continue
        epsilon = settings.get("epsilon")
        attack = Attack(
            name.split("@")[0],
            str(settings.get("norm") or ""),
            float(epsilon) if is_number(epsilon) else None,
        )
        measured = Measured(float(accuracy), _count(settings.get("examples")), settings)
        before = robust.get(attack)
        if before is None or (before.examples or 0) < (measured.examples or 0):
            robust[attack] = measured
    return robust


def _system(found: Mapping[str, Any], macs: Mapping[str, Any]) -> str:
    """What kind of network it is, in the words of the front page."""
    routed = is_number(macs.get("router")) and macs["router"] > 0
    if str(found.get("model", "")).startswith("vit"):
        return "V-MoE" if routed else "ViT"
    kind = "mixture" if routed else "dense"
    return f"multi-exit {kind}" if found.get("exits") else kind


def _lines(entries: list[Entry], left_out: list[str]) -> list[Line]:
    """Entries of a group as one line; a seed that is there already begins another line."""
    lines: dict[str, list[list[Entry]]] = {}
    for entry in entries:
        of_group = lines.setdefault(entry.group, [])
        twins = [x for line in of_group for x in line if x.sha256 and x.sha256 == entry.sha256]
        if twins:
            left_out.append(f"{entry.name} is a copy of {twins[0].name} (left out)")
            continue
        for line in of_group:
            if entry.facts.get("seed") not in {x.facts.get("seed") for x in line}:
                line.append(entry)
                break
        else:
            of_group.append([entry])
    return [Line(tuple(line)) for of_group in lines.values() for line in of_group]


def _without_places(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without_places(value, f"{prefix}{name}.")
        if isinstance(value, Mapping)
        else _without_place(prefix + name, value)
        for name, value in config.items()
        if prefix + name not in _FREE
    }


def _without_place(name: str, value: Any) -> Any:
    if name in _DATA:
        return str(value).rstrip("/").rsplit("/", 1)[-1]
    return bool(value) if name in _STARTS else value


def _count(value: Any) -> int | None:
    return round(value) if is_number(value) else None
