"""A comparison as tables, figures and one page; everything is read from what was gathered.

All figures of accuracies are in per cent, their differences in percentage points.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.evaluation import explanation_figures
from advmoe_jax.evaluation.figures import (
    BLUE,
    COLOURS,
    GREEN,
    PURPLE,
    VERMILION,
    grid,
    legend_beside,
    png_of,
)
from advmoe_jax.evaluation.page import (
    escape,
    facts_html,
    figure_html,
    page,
    table_html,
    warnings_html,
)
from advmoe_jax.evaluation.results import write_results
from advmoe_jax.evaluation.table import as_mapping, integer, is_number, radius
from advmoe_jax.training.log import METRICS, read_metrics

Tree = Mapping[str, Any]

# Colour, marker and line together tell rows apart, with any colour blindness and in grey.
_STYLES = {
    "at_dense": {"color": "black", "marker": "o", "linestyle": "-"},
    "at_s_dense": {"color": COLOURS[7], "marker": "s", "linestyle": "--"},
    "at_sparse": {"color": COLOURS[5], "marker": "^", "linestyle": "--"},
    "at_moe": {"color": GREEN, "marker": "D", "linestyle": "-"},
    "advmoe_assignment": {"color": VERMILION, "marker": "o", "linestyle": "-", "linewidth": 2.2},
    "advmoe_pathway": {"color": BLUE, "marker": "*", "linestyle": "-", "linewidth": 2.2},
    "standard_moe": {"color": COLOURS[4], "marker": "v", "linestyle": ":"},
    "robust_router": {"color": PURPLE, "marker": "P", "linestyle": ":"},
    "robust_experts": {"color": COLOURS[6], "marker": "X", "linestyle": ":"},
}
_CURVES = {
    ("standard_accuracy",): ("validation SA (%)", 100),
    ("robust_accuracy",): ("validation RA (%)", 100),
    ("routing", "entropy"): ("entropy of the router's\nchoice, validation (nats)", 1),
}
_CAPTIONS = {
    "curves.png": "Training: means over seeds, bands from the lowest seed to the highest.",
    "macs.png": "Robust accuracy against cost. Bars: {level} intervals over seeds. Rows of equal "
    "cost are set side by side.",
    "epsilon.png": "Robust accuracy against the radius of the ball, means over seeds: PGD-{steps}, "
    "whose step grows with the radius.",
    "load_per_class.png": "Where the images of each class go, seed {seed}.",
    "images.png": "Images that show what the attack does to {row}, seed {seed}. Below each: what "
    "it is seen as, and its route.",
}


def write(root: Path, found: Tree) -> Path:
    """Writes ``results.json``, ``table.md``, ``table.csv``, figures and ``report.html``.

    Args:
        root: directory of the comparison.
        found: what ``comparison.gather`` returned.

    Returns:
        The path of ``report.html``, which needs no other file.
    """
    write_results(root, found)
    (root / "table.md").write_text(markdown(found), encoding="utf-8")
    (root / "table.csv").write_text(table_csv(found), encoding="utf-8")
    figures = _figures(root, found)
    for name, png in figures.items():
        (root / name).write_bytes(png)
    path = root / "report.html"
    path.write_text(_page(root, found, figures), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ tables


def main_table(found: Tree) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the main table, as text."""
    rows = _measured_rows(found)
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
                *(_estimate(row["estimates"].get(name), _scale(name)) for name in shown),
                f"{_millions(macs['total'])}{parts if macs['router'] else ''}",
                integer(row["cost"]["params"]["total"]),
                str(len(row["runs"])),
            ]
        )
    return headers, body


def difference_table(found: Tree) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the differences from the reference row; no rows if it was not run."""
    accuracies = [name for name in found["columns"] if "accuracy" in name]
    rows = {n: r for n, r in _measured_rows(found).items() if n != found["reference"]}
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


def markdown(found: Tree) -> str:
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


def table_csv(found: Tree) -> str:
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
    """What can be said of AdvMoE against the reference, and what cannot."""
    reference = found["rows"].get(found["reference"])
    if reference is None or not reference["runs"]:
        return []
    lines = []
    for name, row in _measured_rows(found).items():
        if not name.startswith("advmoe"):
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
        row["estimates"]["standard_accuracy"]["count"] for row in _measured_rows(found).values()
    }
    level = f"{100 * found['level']:g}%"
    if not counts:
        return ["no run is finished yet"]
    lines = []
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
            f"{integer(settings.get('examples'))} test images",
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


def _measured_rows(found: Tree) -> dict[str, Tree]:
    return {name: row for name, row in found["rows"].items() if row["runs"]}


def _scale(column: str) -> float:
    return 1 if column == "images_per_second" else 100


def _estimate(estimate: Tree | None, scale: float) -> str:
    if estimate is None:
        return "–"
    digits = 1 if scale == 100 else 0
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


# ----------------------------------------------------------------------------------------- figures


def _figures(root: Path, found: Tree) -> dict[str, bytes]:
    """Every figure that there are numbers for, by the name of its file."""
    rows = _measured_rows(found)
    if not rows:
        return {}
    figures = {"curves.png": _curves(root, rows), "macs.png": _macs(found, rows)}
    curves = {row["title"]: _mean_curve(row) for row in rows.values()}
    first = next(iter(next(iter(rows.values()))["runs"].values()))
    figures["epsilon.png"] = explanation_figures.accuracy_against_epsilon(
        curves,
        first["curve"]["attack"]["norm"],
        found["config"]["run"]["attack"]["epsilon"],
        {row["title"]: _STYLES[name] for name, row in rows.items()},
    )
    shown = _first_mixtures(found)
    if shown:
        figures["load_per_class.png"] = explanation_figures.load_per_class(
            {row["title"]: run["routing"]["load_per_class"] for row, run in shown.values()},
            first["class_names"],
        )
        # The run drew it; here the one to look at first is shown again.
        grid_of = root / _preferred(shown) / f"seed{_seed_of(found)}" / "images.png"
        if grid_of.is_file():
            figures["images.png"] = grid_of.read_bytes()
    return figures


def _seed_of(found: Tree) -> int:
    return found["seeds"][0]


def _first_mixtures(found: Tree) -> dict[str, tuple[Tree, Tree]]:
    """Rows with a router whose first seed is finished, and that run."""
    seed = str(_seed_of(found))
    return {
        name: (row, row["runs"][seed])
        for name, row in found["rows"].items()
        if as_mapping(row["runs"].get(seed)).get("routing")
    }


def _preferred(shown: Mapping[str, Any]) -> str:
    return next((name for name in shown if name.startswith("advmoe")), next(iter(shown)))


def _mean_curve(row: Tree) -> tuple[list[float], list[float]]:
    runs = list(row["runs"].values())
    accuracies = np.mean([run["curve"]["accuracy"] for run in runs], axis=0)
    return runs[0]["curve"]["epsilon"], accuracies.tolist()


def _curves(root: Path, rows: Mapping[str, Tree]) -> bytes:
    """Validation SA, RA and the router's entropy over epochs."""
    logged = {
        name: [read_metrics(root / name / f"seed{seed}" / METRICS) for seed in row["runs"]]
        for name, row in rows.items()
    }

    def draw(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        all_axes = figure.subplots(len(_CURVES), sharex=True)
        for axes, (path, (label, scale)) in zip(all_axes, _CURVES.items(), strict=True):
            grid(axes)
            axes.set_ylabel(label)
            for name, row in rows.items():
                _band(axes, logged[name], path, scale, row["title"], _STYLES[name])
            top = axes.dataLim.ymax
            axes.set_ylim(0, 1.06 * top if math.isfinite(top) and top > 0 else 1)
        legend_beside(all_axes[0])
        all_axes[-1].set_xlabel("epoch")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return png_of(draw, (9.0, 8.4))


def _band(
    axes: Any,
    runs: Sequence[Sequence[Tree]],
    path: Sequence[str],
    scale: float,
    title: str,
    style: Tree,
) -> None:
    by_epoch: dict[int, list[float]] = {}
    for epochs in runs:
        for entry in epochs:
            value: Any = entry.get("validation")
            for part in path:
                value = as_mapping(value).get(part)
            if is_number(value):
                by_epoch.setdefault(entry["epoch"], []).append(scale * value)
    if not by_epoch:
        return
    x = sorted(by_epoch)
    many = {"marker": None} if len(x) > 20 else {"markersize": 4}
    axes.plot(x, [np.mean(by_epoch[e]) for e in x], label=title, **{**style, **many})
    low, high = ([f(by_epoch[e]) for e in x] for f in (min, max))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _macs(found: Tree, rows: Mapping[str, Tree]) -> bytes:
    """RA over MACs per image, one panel for each attack."""
    robust = [name for name in found["columns"] if name.startswith("robust_accuracy")]
    robust = [c for c in robust if any(row["estimates"].get(c) for row in rows.values())]
    places = _side_by_side({name: row["cost"]["macs"]["total"] / 1e6 for name, row in rows.items()})

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(robust), sharex=True, squeeze=False)[:, 0]
        for axes, column in zip(all_axes, robust, strict=True):
            grid(axes)
            for name, row in rows.items():
                estimate = row["estimates"].get(column)
                if estimate is None:
                    continue
                half_width = estimate["half_width"]
                axes.errorbar(
                    places[name],
                    100 * estimate["mean"],
                    yerr=None if half_width is None else 100 * half_width,
                    label=row["title"],
                    markersize=8,
                    capsize=4,
                    color=_STYLES[name]["color"],
                    marker=_STYLES[name]["marker"],
                    linestyle="none",
                )
            axes.set_ylabel(found["columns"][column].replace(" %", " (%)"))
            low, high = axes.get_ylim()
            room = max(0, 5 - (high - low)) / 2  # no difference of a tenth of a point fills a panel
            axes.set_ylim(max(low - room, -2), min(high + room, 101))
        all_axes[-1].set_xlabel("multiply-accumulates per image, router and pathway (millions)")
        all_axes[-1].set_xlim(left=0)
        legend_beside(all_axes[0])

    return png_of(draw, (9.0, 0.8 + 3.0 * len(robust)))


def _side_by_side(values: Mapping[str, float]) -> dict[str, float]:
    """Moves values that are nearly equal apart, by little, about their middle."""
    step = 0.018 * max(values.values())
    groups: list[list[str]] = []
    for name in sorted(values, key=lambda name: values[name]):
        if groups and values[name] - values[groups[-1][0]] < step:
            groups[-1].append(name)
        else:
            groups.append([name])
    return {
        name: values[name] + step * (i - (len(group) - 1) / 2)
        for group in groups
        for i, name in enumerate(group)
    }


# ---------------------------------------------------------------------------------------- the page


def _page(root: Path, found: Tree, figures: Mapping[str, bytes]) -> str:
    rows = _measured_rows(found)
    runs = [run for row in rows.values() for run in row["runs"].values()]
    about = {(run["model"], run["dataset"]) for run in runs}
    title = "Comparison: " + ", ".join(f"{m} on {d}" for m, d in sorted(about))
    reference = as_mapping(found["rows"].get(found["reference"])).get("title", found["reference"])
    headers, differences = difference_table(found)
    words = {
        "level": f"{100 * found['level']:g}%",
        "seed": _seed_of(found),
        "steps": runs[0]["curve"]["attack"]["num_steps"] if runs else "",
        "row": found["rows"][_preferred(shown)]["title"]
        if (shown := _first_mixtures(found))
        else "",
    }
    sections = [
        f"<h1>{escape(title if runs else 'Comparison')}</h1>",
        *warnings_html(complaints(found)),
        _list([*verdicts(found)]),
        "<h2>Accuracy and cost</h2>",
        table_html(*main_table(found)),
        *([f"<h2>Difference to {escape(reference)}, percentage points</h2>",
           table_html(headers, differences)] if differences else []),
        _list(notes(found)),
        "<h2>The rows</h2>",
        facts_html({row["title"]: row["about"] for row in rows.values()}),
        "<h2>Figures</h2>",
        *(
            figure_html(figures[name], caption.format(**words), caption.format(**words))
            for name, caption in _CAPTIONS.items()
            if name in figures
        ),
        "<h2>Where these numbers come from</h2>",
        facts_html(
            {
                "Seeds": ", ".join(map(str, found["seeds"])),
                "Device": "; ".join(sorted({run["device"] for run in runs})),
                "Commit": ", ".join(sorted({str(run["git_commit"]) for run in runs})),
                "Versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
                "Command": found.get("command", ""),
                "Each run": "report.html, results.json and explanation.json in "
                "<row>/seed<seed> beside this page",
            }
        ),
        "<details><summary>The whole config</summary>"
        f"<pre>{escape(json.dumps(found['config'], indent=2))}</pre></details>",
    ]  # fmt: skip
    return page("Comparison", sections)


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""
