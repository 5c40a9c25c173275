"""The figures of a comparison: curves of training, accuracy against cost and radius, routes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.metrics import METRICS, read_metrics
from advmoe_jax.reports import exit_examples
from advmoe_jax.reports.comparison_tables import measured_rows
from advmoe_jax.reports.exit_figures import exit_figures
from advmoe_jax.reports.explanation import accuracy_against_epsilon, load_per_class
from advmoe_jax.reports.figures import COLOURS, grid, legend_beside, png_of
from advmoe_jax.reports.table import as_mapping, is_number

Tree = Mapping[str, Any]

# What a row is drawn with that brings no style. Colour, marker and line together tell rows apart,
# with any colour blindness and in grey; colours and markers repeat at different lengths.
_MARKERS = ("o", "s", "^", "D", "*", "v", "P", "X", "<")
_LINES = ("-", "--", ":")
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
    "exit_shares.png": "Where images leave: the share of each exit, seed {seed}, clean and under "
    "each attack.",
    "exit_curves.png": "Accuracy against mean multiply-accumulates per image as thresholds move, "
    "seed {seed}; attacked images are those made for the thresholds of the table.",
    exit_examples.FILE: "{leaving}, seed {seed}. " + exit_examples.CAPTION,
    "images.png": "Images that show what the attack does to {row}, seed {seed}. Below each: what "
    "it is seen as, and its route.",
}


def comparison_figures(root: Path, found: Tree) -> dict[str, bytes]:
    """Every figure that there are numbers for, a PNG by the name of its file.

    Args:
        root: directory of the comparison, whose runs' ``metrics.jsonl`` are read.
        found: what the comparison gathered.
    """
    rows, styles = measured_rows(found), row_styles(found)
    if not rows:
        return {}
    figures = {"curves.png": _curves(root, rows, styles), "macs.png": _macs(found, rows, styles)}
    curves = {row["title"]: _mean_curve(row) for row in rows.values()}
    first = next(iter(next(iter(rows.values()))["runs"].values()))
    figures["epsilon.png"] = accuracy_against_epsilon(
        curves,
        first["curve"]["attack"]["norm"],
        found["config"]["run"]["attack"]["epsilon"],
        {row["title"]: styles[name] for name, row in rows.items()},
    )
    figures |= exit_figures(rows, styles, str(_seed_of(found)), found["columns"])
    if leaving := _first_with_exits(found):
        examples = root / leaving / f"seed{_seed_of(found)}" / exit_examples.FILE
        if examples.is_file():
            figures[exit_examples.FILE] = examples.read_bytes()
    shown = _first_mixtures(found)
    if shown:
        figures["load_per_class.png"] = load_per_class(
            {row["title"]: run["routing"]["load_per_class"] for row, run in shown.values()},
            first["class_names"],
        )
        # The run drew it; here the one to look at first is shown again.
        grid_of = root / _preferred(shown) / f"seed{_seed_of(found)}" / "images.png"
        if grid_of.is_file():
            figures["images.png"] = grid_of.read_bytes()
    return figures


def captions(found: Tree) -> dict[str, str]:
    """What is to be said of each figure, by the name of its file, in the order to show them."""
    runs = [run for row in measured_rows(found).values() for run in row["runs"].values()]
    shown = _first_mixtures(found)
    leaving = _first_with_exits(found)
    words = {
        "leaving": found["rows"][leaving]["title"] if leaving else "",
        "level": f"{100 * found['level']:g}%",
        "seed": _seed_of(found),
        "steps": runs[0]["curve"]["attack"]["num_steps"] if runs else "",
        "row": found["rows"][_preferred(shown)]["title"] if shown else "",
    }
    return {name: caption.format(**words) for name, caption in _CAPTIONS.items()}


def row_styles(found: Tree) -> dict[str, Tree]:
    """Settings of matplotlib's plot for every row: its own, the palette's where it has none."""
    palette = zip(cycle(COLOURS), cycle(_MARKERS), cycle(_LINES), strict=False)
    return {
        name: {"color": color, "marker": marker, "linestyle": line, **(row.get("style") or {})}
        for (name, row), (color, marker, line) in zip(found["rows"].items(), palette, strict=False)
    }


def _seed_of(found: Tree) -> int:
    return found["seeds"][0]


def _first_with_exits(found: Tree) -> str:
    """The row with side exits to look at first: one that is judged, if there is; or empty."""
    seed = str(_seed_of(found))
    names = [
        name
        for name, row in found["rows"].items()
        if as_mapping(row["runs"].get(seed)).get("exits")
    ]
    return next((name for name in names if found["rows"][name]["judged"]), (names or [""])[0])


def _first_mixtures(found: Tree) -> dict[str, tuple[Tree, Tree]]:
    """Rows with a router whose first seed is finished, and that run."""
    seed = str(_seed_of(found))
    return {
        name: (row, row["runs"][seed])
        for name, row in found["rows"].items()
        if as_mapping(row["runs"].get(seed)).get("routing")
    }


def _preferred(shown: Mapping[str, tuple[Tree, Tree]]) -> str:
    return next((name for name, (row, _) in shown.items() if row["judged"]), next(iter(shown)))


def _mean_curve(row: Tree) -> tuple[list[float], list[float]]:
    runs = list(row["runs"].values())
    accuracies = np.mean([run["curve"]["accuracy"] for run in runs], axis=0)
    return runs[0]["curve"]["epsilon"], accuracies.tolist()


def _curves(root: Path, rows: Mapping[str, Tree], styles: Mapping[str, Tree]) -> bytes:
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
                _band(axes, logged[name], path, scale, row["title"], styles[name])
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


def _macs(found: Tree, rows: Mapping[str, Tree], styles: Mapping[str, Tree]) -> bytes:
    """RA over MACs per image, one panel for each attack."""
    robust = [name for name in found["columns"] if name.startswith("robust_accuracy")]
    robust = [c for c in robust if any(row["estimates"].get(c) for row in rows.values())]
    costs = {name: row["cost"]["macs"]["total"] / 1e6 for name, row in rows.items()}
    left = left_end(costs.values())
    width = max(costs.values()) - left
    places = side_by_side(costs, width)

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
                    color=styles[name]["color"],
                    marker=styles[name]["marker"],
                    linestyle="none",
                )
            axes.set_ylabel(found["columns"][column].replace(" %", " (%)"))
            low, high = axes.get_ylim()
            room = max(0, 5 - (high - low)) / 2  # no difference of a tenth of a point fills a panel
            axes.set_ylim(max(low - room, -2), min(high + room, 101))
        all_axes[-1].set_xlabel("multiply-accumulates per image, router and pathway (millions)")
        all_axes[-1].set_xlim(left, max(places.values()) + 0.05 * width)
        legend_beside(all_axes[0])

    return png_of(draw, (9.0, 0.8 + 3.0 * len(robust)))


def left_end(values: Iterable[float]) -> float:
    """Where an axis begins: at 0, unless all values would crowd in its right half.

    At least a fifth of the largest is shown, so that small differences look small.
    """
    values = list(values)
    low, high = min(values), max(values)
    return 0.0 if low < high / 2 or low == high else min(low - 0.15 * (high - low), 0.8 * high)


def side_by_side(values: Mapping[str, float], width: float) -> dict[str, float]:
    """Moves values that are nearly equal apart, by little of the axis, about their middle."""
    step = 0.018 * width
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
