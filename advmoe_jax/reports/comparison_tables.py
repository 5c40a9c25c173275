"""A comparison as tables and sentences.

Accuracies are in per cent, their differences in percentage points. All functions take what the
comparison gathered (see ``comparison.write_comparison``).
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from advmoe_jax.reports.table import as_mapping, integer, is_number, radius

Tree = Mapping[str, Any]


def main_table(found: Tree) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the main table, as text."""
    rows = measured_rows(found)
    shown = [
        name
        for name in found["columns"]
        if any(row["estimates"].get(name) is not None for row in rows.values())
    ]
    headers = ["", *(found["columns"][name] for name in shown)]
    headers += ["MACs per image (router + pathway)", "parameters", "seeds"]
    body = []
    for row in rows.values():
        macs = row["cost"]["macs"]
        parts = f" ({_millions(macs['router'])} + {_millions(macs['pathway'])})"
        body.append(
            [
                row["title"],
                *(_estimate(row["estimates"].get(name), found["columns"][name]) for name in shown),
                f"{_millions(macs['total'])}{parts if macs['router'] else ''}",
                integer(row["cost"]["params"]["total"]),
                str(len(row["runs"])),
            ]
        )
    return headers, body


def difference_table(found: Tree) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the differences from the reference row; no rows if it was not run."""
    accuracies = [name for name in found["columns"] if "accuracy" in name]
    rows = {n: r for n, r in measured_rows(found).items() if n != found["reference"]}
    shown = [
        name
        for name in accuracies
        if any(row["differences"].get(name) is not None for row in rows.values())
    ]
    headers = ["", *(found["columns"][name].removesuffix(" %") for name in shown)]
    body = [
        [row["title"], *(_difference(row["differences"].get(name)) for name in shown)]
        for row in rows.values()
    ]
    return headers, body if shown else []


def comparison_markdown(found: Tree) -> str:
    """Both tables in Markdown, with what the numbers are and where they come from."""
    parts = [_markdown_table(*main_table(found))]
    headers, body = difference_table(found)
    if body:
        title = found["rows"][found["reference"]]["title"]
        parts += [f"Difference to {title}, percentage points:", _markdown_table(headers, body)]
    parts += [f"- {line}" for line in [*verdicts(found), *notes(found), *complaints(found)]]
    return (
        "\n\n".join(parts[: 3 if body else 1])
        + "\n\n"
        + "\n".join(parts[3 if body else 1 :])
        + "\n"
    )


def comparison_csv(found: Tree) -> str:
    """One line a row for programs; accuracies in shares of 1, cost in MACs and parameters."""
    file = io.StringIO()
    measured = list(found["columns"])
    accuracies = [name for name in measured if "accuracy" in name]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["row", "title", "seeds"]
        + [f"{name}.{part}" for name in measured for part in ("mean", "half_width")]
        + [f"{name}.difference{part}" for name in accuracies for part in ("", "_half_width")]
        + ["macs.total", "macs.router", "macs.pathway", "params"]
    )
    for name, row in found["rows"].items():
        cells: list[Any] = [name, row["title"], len(row["runs"])]
        for kind, columns in (("estimates", measured), ("differences", accuracies)):
            for column in columns:
                estimate = row[kind].get(column) or {}
                cells += [estimate.get("mean"), estimate.get("half_width")]
        cost = row["cost"] or {"macs": {}, "params": {}}
        cells += [cost["macs"].get(part) for part in ("total", "router", "pathway")]
        writer.writerow([*cells, cost["params"].get("total")])
    return file.getvalue()


def verdicts(found: Tree) -> list[str]:
    """What can be said of the rows that are ``judged`` against the reference, and what cannot."""
    reference = found["rows"].get(found["reference"])
    if reference is None or not reference["runs"]:
        return []
    lines = []
    for name, row in measured_rows(found).items():
        if name == found["reference"] or not row["judged"]:
            continue
        said = []
        for column, header in found["columns"].items():
            difference = row["differences"].get(column)
            if difference is not None:
                said.append(f"{header.removesuffix(' %')} {_verdict(difference)}")
        share = row["cost"]["macs"]["total"] / reference["cost"]["macs"]["total"]
        lines.append(
            f"{row['title']} against {reference['title']}, at {share:.2f} of its MACs: "
            + "; ".join(said)
        )
    return lines


def _verdict(difference: Tree) -> str:
    text = f"{_difference(difference)} points"
    mean, half_width = difference["mean"], difference["half_width"]
    if half_width is None:
        return f"{text} (one seed, so no interval: this may be chance)"
    if abs(mean) <= half_width:
        return f"{text} (no difference shown: the interval holds 0)"
    return f"{text} ({'above' if mean > 0 else 'below'} it)"


def notes(found: Tree) -> list[str]:
    """How to read the tables."""
    counts = {
        row["estimates"]["standard_accuracy"]["count"] for row in measured_rows(found).values()
    }
    level = f"{100 * found['level']:g}%"
    if not counts:
        return ["no run is finished yet"]
    remark = found["config"].get("remark")
    lines = [remark] if remark else []
    if max(counts) > 1:
        lines.append(
            f"mean ± half of the {level} interval over seeds (Student's t); differences are taken "
            "seed by seed"
        )
    if min(counts) == 1:
        lines.append("where there is one seed there is no interval")
    timed = found["throughput"]
    if timed["batch_size"]:
        lines.append(
            f"images/s: inference in batches of {timed['batch_size']}, all runs in turn in one "
            f"process, on {timed['device']}"
        )
    return lines + _attack_notes(found)


def _attack_notes(found: Tree) -> list[str]:
    """The settings of each attack, from the first run that has it."""
    attacks: dict[str, Tree] = {}
    data = as_mapping(found["config"]["run"].get("data"))
    images = "withheld images" if data.get("test_split") == "withheld" else "test images"
    for row in found["rows"].values():
        for run in row["runs"].values():
            for name, settings in run["attacks"].items():
                attacks.setdefault(name, settings)
    lines = []
    for name, settings in attacks.items():
        column = "standard_accuracy" if name == "clean" else f"robust_accuracy.{name}"
        if column not in found["columns"]:
            continue
        words = [
            str(settings.get("norm") or ""),
            f"epsilon {radius(settings['epsilon'])}" if "epsilon" in settings else "",
            f"{settings['num_steps']} steps" if is_number(settings.get("num_steps")) else "",
            f"step size {radius(settings['step_size'])}"
            if is_number(settings.get("step_size"))
            else "",
            f"{integer(settings.get('examples'))} {images}",
        ]
        title = found["columns"][column].removesuffix(" %")
        lines.append(f"{title}: {', '.join(filter(None, words))}")
    return lines


def complaints(found: Tree) -> list[str]:
    """What is missing, and what the runs warned of."""
    lines = []
    for row in found["rows"].values():
        lines += [
            f"{row['title']}, seed {seed}, is not in the table: {reason}"
            for seed, reason in row["failed"].items()
        ]
        missing = [
            str(seed)
            for seed in found["seeds"]
            if str(seed) not in row["runs"] and str(seed) not in row["failed"]
        ]
        if missing:
            lines.append(f"{row['title']}, not finished yet: seed {', '.join(missing)}")
        by_warning: dict[str, list[str]] = {}
        for seed, run in row["runs"].items():
            for warning in run["warnings"]:
                by_warning.setdefault(warning, []).append(seed)
        lines += [
            f"{row['title']}, seed {', '.join(its_seeds)}: {warning}"
            for warning, its_seeds in by_warning.items()
        ]
    return lines


def measured_rows(found: Tree) -> dict[str, Tree]:
    """The rows that have a finished run, by name."""
    return {name: row for name, row in found["rows"].items() if row["runs"]}


def _estimate(estimate: Tree | None, header: str) -> str:
    """Mean and interval; shares of 1 in per cent where the header says so."""
    if estimate is None:
        return "–"
    scale, digits = (100, 1) if header.endswith("%") else (1, 0 if header == "images/s" else 2)
    mean = f"{scale * estimate['mean']:,.{digits}f}"
    if estimate["half_width"] is None:
        return mean
    return f"{mean} ± {scale * estimate['half_width']:,.{digits}f}"


def _difference(estimate: Tree | None) -> str:
    if estimate is None:
        return "–"
    mean = f"{100 * estimate['mean']:+.1f}"
    if estimate["half_width"] is None:
        return mean
    return f"{mean} ± {100 * estimate['half_width']:.1f}"


def _millions(macs: float) -> str:
    """MACs in millions, three digits."""
    millions = macs / 1e6
    digits = max(0, 2 - math.floor(math.log10(millions))) if millions > 0 else 0
    return f"{millions:,.{min(digits, 4)}f} M"


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
