"""The report of a run: one HTML file with numbers, curves and config, and nothing to download."""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.table import (
    DEAD_SHARE,
    AttackRow,
    as_mapping,
    attack_rows,
    integer,
    is_number,
    load_per_expert,
    number,
    percent,
    title,
)

# Okabe and Ito's colours: told apart with any common colour blindness, and in grey.
_BLUE, _VERMILION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_EXPERT_COLOURS = (_BLUE, _VERMILION, _GREEN, _PURPLE, "#E69F00", "#56B4E9", "#B8A800", "#555555")
_MAX_LABELLED_EXPERTS = 16

_STYLE = """
html { font-size: 16px; }
body { font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.headline { display: flex; flex-wrap: wrap; gap: 1rem; }
.headline div { flex: 1 1 20rem; border: 1px solid #ccc; border-radius: 6px; padding: .7rem 1rem; }
.headline strong { display: block; font-size: 2.2rem; line-height: 1.2; }
.headline small { color: #444; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; font-size: .92rem; } .scroll td { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #888; }
.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
.facts th { font-weight: 600; white-space: nowrap; vertical-align: top; padding-right: 1.5rem; }
details { margin-top: 1.5rem; }
.warning { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .4rem .8rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; }
pre { font-size: .82rem; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  html { font-size: 12px; }
  body { margin: 0; padding: 0; max-width: none; }
  .scroll { overflow-x: visible; }
  h2 { break-after: avoid; }
  .headline, tr, figure { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def write_report(workdir: Path) -> Path:
    """Writes `curves.png` and a self-contained `report.html` about the run in `workdir`.

    Reads `results.json`, and `config.json` and `metrics.jsonl` as far as they exist: without
    metrics there are no curves, and what could not be read is said in the report.

    Args:
      workdir: the run's directory.

    Returns:
      The path of `report.html`.

    Raises:
      UserError: `results.json` is missing or damaged.
    """
    workdir = Path(workdir)
    results = _read_results(workdir / "results.json")
    warnings = [str(warning) for warning in results.get("warnings") or []]
    config = _read_config(workdir / "config.json", results, warnings)
    epochs = _read_epochs(workdir / "metrics.jsonl", warnings)
    curves = _draw_curves(epochs) if epochs else None
    if curves:
        (workdir / "curves.png").write_bytes(curves)
    path = workdir / "report.html"
    path.write_text(_page(results, config, epochs, curves, warnings), encoding="utf-8")
    return path


# --- reading -----------------------------------------------------------------------------------


def _read_results(path: Path) -> dict[str, Any]:
    """Reads `results.json`; raises UserError, naming it, if it is missing or no JSON object."""
    again = f"run `python -m advmoe_jax.evaluate --workdir={path.parent}` to write it"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {again}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {again} anew") from None
    if not isinstance(results, dict):
        raise UserError(f"{path} does not hold a JSON object: {again} anew")
    return results


def _read_config(path: Path, results: Mapping[str, Any], warnings: list[str]) -> Any:
    """Reads `config.json`, or takes the copy in the results; appends to `warnings` if damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        warnings.append(
            f"{path.name} cannot be read ({error}); the config in results.json is shown"
        )
    return results.get("config")


def _read_epochs(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """Reads the lines of `metrics.jsonl` that describe an epoch, in order of epochs.

    A run that was killed may end in half a line, and one that was resumed may hold an epoch twice:
    the last one counts. Appends to `warnings` if lines cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    epochs, damaged = {}, 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(entry, dict) and is_number(entry.get("epoch")):
            epochs[entry["epoch"]] = entry
    if damaged:
        warnings.append(f"{damaged} line(s) of {path.name} cannot be read and are left out")
    return [epochs[epoch] for epoch in sorted(epochs)]


# --- curves ------------------------------------------------------------------------------------


def _draw_curves(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws loss, accuracy and, for a mixture of experts, routing over epochs; returns a PNG."""
    # Imported here: it takes a second that only a report is worth. No pyplot: it keeps figures in
    # global state and may want a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels: list[Callable[..., None]] = [_draw_loss, _draw_accuracy]
    split = _routing_split(epochs)
    if split:
        panels.append(_draw_routing)
    settings = {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(9.0, 2.9 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for letter, axes, draw in zip("abc", all_axes, panels, strict=False):
            axes.grid(color="#dddddd", linewidth=0.8)
            draw(axes, epochs)
            axes.set_title(f"({letter}) {axes.get_title(loc='left')}")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        all_axes[-1].set_xlabel("epoch")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _draw_loss(axes: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Every scalar called a loss, as training and validation recorded it."""
    names = {
        (split, name): None  # a dict, because it keeps the order
        for split in ("train", "validation")
        for entry in epochs
        for name, value in as_mapping(entry.get(split)).items()
        if name.endswith("loss") and is_number(value)
    }
    for index, (split, name) in enumerate(names):
        label = f"{name.replace('_', ' ')}, {'training' if split == 'train' else split}"
        colour = _EXPERT_COLOURS[index % len(_EXPERT_COLOURS)]
        _plot(axes, epochs, (split, name), color=colour, label=label)
    axes.set(title="Loss", ylabel="loss (nats)")


def _draw_accuracy(axes: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Standard and robust accuracy: colours tell them apart, dashes the split."""
    for name, short, colour in (
        ("standard_accuracy", "SA", _BLUE),
        ("robust_accuracy", "RA", _VERMILION),
    ):
        for split, label, style in (("validation", "validation", "-"), ("train", "training", "--")):
            _plot(
                axes,
                epochs,
                (split, name),
                scale=100,
                color=colour,
                linestyle=style,
                label=f"{short}, {label}",
            )
    axes.set(
        title="Standard accuracy (SA) and robust accuracy (RA)",
        ylabel="accuracy (%)",
        ylim=(0, 101),
    )


def _draw_routing(axes: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Share of the images that each expert sees, and how often an attack leaves the route alone."""
    split = _routing_split(epochs)
    num_experts = max(len(_load(entry, split)) for entry in epochs)
    few = num_experts <= _MAX_LABELLED_EXPERTS
    for expert in range(num_experts):
        _plot(
            axes,
            epochs,
            (split, "routing", "load", expert),
            scale=100,
            color=_EXPERT_COLOURS[expert % len(_EXPERT_COLOURS)] if few else "#888888",
            linestyle=":" if few and expert >= len(_EXPERT_COLOURS) else "-",
            label=f"expert {expert}" if few else None,
        )
    if num_experts > _MAX_LABELLED_EXPERTS:
        axes.plot([], [], color="#888888", label=f"each of {num_experts} experts")
    agreement = (split, "routing", "agreement")
    _plot(axes, epochs, agreement, scale=100, color="black", linestyle="--", label="agreement")
    axes.axhline(100 * DEAD_SHARE, color="#B00020", linestyle=(0, (1, 1)), linewidth=1.5,
                 label=f"{100 * DEAD_SHARE:g}% warning")  # fmt: skip
    # On a linear scale the warning line would lie on the axis.
    axes.set_yscale(
        "function", functions=(lambda y: _signed_power(y, 0.5), lambda y: _signed_power(y, 2.0))
    )
    axes.set_yticks([0, 1, 5, 10, 25, 50, 75, 100], labels=map(str, [0, 1, 5, 10, 25, 50, 75, 100]))
    axes.set(
        title="Load per expert, and routing agreement clean / attacked "
        f"({'training' if split == 'train' else split})",
        ylabel="share of images\n(%, square-root scale)",
        ylim=(0, 101),
    )


def _signed_power(values: Any, exponent: float) -> Any:
    """A power that is defined, and monotone, below zero too, where margins of an axis lie."""
    import numpy as np

    return np.sign(values) * np.abs(values) ** exponent


def _plot(
    axes: Any,
    epochs: Sequence[Mapping[str, Any]],
    keys: Sequence[str | int],
    scale: float = 1,
    **style: Any,
) -> None:
    """Plots `entry[keys[0]][keys[1]]...` over epochs, for the epochs that have it."""
    values = [(entry["epoch"], scale * _number_at(entry, keys)) for entry in epochs]
    values = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    if values:
        # Markers make a run of one epoch visible; in a long run they would hide the line.
        marker = "o" if len(values) <= 20 else None
        axes.plot(*zip(*values, strict=True), marker=marker, markersize=4, **style)


def _number_at(entry: Any, keys: Sequence[str | int]) -> float:
    """Looks up nested keys and indices; NaN if there is no finite number."""
    for key in keys:
        try:
            entry = entry[key]
        except (KeyError, IndexError, TypeError):
            return math.nan
    return float(entry) if is_number(entry) else math.nan


def _routing_split(epochs: Sequence[Mapping[str, Any]]) -> str | None:
    """Whose routing to show: `validation` if any epoch has it, else `train`; None if dense."""
    for split in ("validation", "train"):
        if any(_load(entry, split) for entry in epochs):
            return split
    return None


def _load(entry: Mapping[str, Any], split: str) -> Sequence[float]:
    """Load per expert of one epoch; empty if it was not recorded."""
    load = as_mapping(as_mapping(entry.get(split)).get("routing")).get("load")
    return load if isinstance(load, list) else []


# --- the page ----------------------------------------------------------------------------------


def _page(
    results: Mapping[str, Any],
    config: Any,
    epochs: Sequence[Mapping[str, Any]],
    curves: bytes | None,
    warnings: Sequence[str],
) -> str:
    """Puts the sections together."""
    name = _escape(title(results))
    sections = [
        f"<h1>{name}</h1>",
        *(f'<p class="warning"><b>Warning:</b> {_escape(warning)}</p>' for warning in warnings),
        _headline(results),
        "<h2>Accuracy under attack</h2>",
        _results_table(results),
        "<h2>Cost and routing</h2>",
        _facts(_cost(results)),
        "<h2>Training</h2>",
        _curves_figure(epochs, curves),
        "<h2>Where these numbers come from</h2>",
        _facts(_provenance(results)),
        "<details><summary>The whole config</summary>"
        f"<pre>{_escape(_json(config))}</pre></details>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _headline(results: Mapping[str, Any]) -> str:
    """Standard accuracy, and robust accuracy under the attack that lowered it most."""
    run = [
        f"training seed {results['seed']}" if results.get("seed") is not None else "",
        str(results.get("device") or ""),
        f"commit {str(results['git_commit'])[:12]}" if results.get("git_commit") else "",
    ]
    attacks = as_mapping(results.get("attacks"))
    accuracies = {
        name: value
        for name, value in as_mapping(results.get("robust_accuracy")).items()
        # Of the run's own threat model, and of the network as it is: see the README.
        if is_number(value)
        and "@" not in name
        and as_mapping(attacks.get(name)).get("judge", "the network") == "the network"
    }
    clean = [_images(as_mapping(attacks.get("clean"))), *run]
    cards = [_card("Standard accuracy (SA)", results.get("standard_accuracy"), clean)]
    if accuracies:
        worst = min(accuracies, key=lambda name: accuracies[name])
        row = next(row for row in attack_rows(results) if row.attack == worst)
        attack = as_mapping(attacks.get(worst))
        conditions = [worst, *_attack_words(row), _images(attack), _attack_seed(attack), *run]
        among = f", lowest of {len(accuracies)} attacks" if len(accuracies) > 1 else ""
        cards.append(_card(f"Robust accuracy (RA){among}", accuracies[worst], conditions))
    return f'<div class="headline">{"".join(cards)}</div>'


def _card(label: str, accuracy: Any, conditions: Sequence[str]) -> str:
    """One headline number, with the conditions under which it holds."""
    shown = f"{percent(accuracy)}%" if percent(accuracy) else "not recorded"
    words = _escape(", ".join(filter(None, conditions)))
    return f"<div>{_escape(label)}<strong>{shown}</strong><small>{words}</small></div>"


def _attack_words(row: AttackRow) -> list[str]:
    """The settings of an attack, in words."""
    return [
        row.norm,
        f"epsilon {row.epsilon}" if row.epsilon else "",
        row.steps.replace(" x ", " steps of "),
        f"{row.restarts} restart(s)" if row.restarts else "",
    ]


def _images(attack: Mapping[str, Any]) -> str:
    """On how many images an accuracy was measured."""
    count = integer(attack.get("examples"))
    return f"{count} images" if count else ""


def _attack_seed(attack: Mapping[str, Any]) -> str:
    """The seed of the attack's random starts."""
    return f"attack seed {attack['seed']}" if attack.get("seed") is not None else ""


def _results_table(results: Mapping[str, Any]) -> str:
    """One row per attack; columns that would be empty are left out."""
    attacks = as_mapping(results.get("attacks"))
    columns = {
        "attack": lambda row: row.attack,
        "accuracy (%)": lambda row: row.accuracy,
        "norm": lambda row: row.norm,
        "epsilon": lambda row: row.epsilon,
        "steps × step size": lambda row: row.steps.replace(" x ", " × "),
        "restarts": lambda row: row.restarts,
        "images": lambda row: integer(as_mapping(attacks.get(row.attack)).get("examples")),
        "seed": lambda row: str(as_mapping(attacks.get(row.attack)).get("seed", "")),
        "router agreement (%)": lambda row: row.agreement,
        "images/s": lambda row: row.images_per_second,
    }
    rows = attack_rows(results)
    cells = {header: [read(row) for row in rows] for header, read in columns.items()}
    cells = {header: column for header, column in cells.items() if any(column)}
    head = "".join(f"<th>{_escape(header)}</th>" for header in cells)
    body = "".join(
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in zip(*cells.values(), strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cost(results: Mapping[str, Any]) -> dict[str, str]:
    """Size and cost of the network, and how its router spreads the images."""
    return {
        "Parameters": integer(results.get("num_params")),
        "Multiply-accumulates per image": integer(results.get("macs_per_image")),
        "Share of the images per expert": load_per_expert(results),
        "Routing entropy": number(as_mapping(results.get("routing")).get("entropy"), " nats"),
    }


def _provenance(results: Mapping[str, Any]) -> dict[str, str]:
    """What one needs to obtain the numbers again."""
    versions = as_mapping(results.get("versions"))
    return {
        "Training steps": integer(results.get("steps")),
        "Training seed": str(results.get("seed", "")),
        "Device": str(results.get("device") or ""),
        "Commit": str(results.get("git_commit") or ""),
        "SHA-256 of the parameters": str(results.get("params_sha256") or ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _facts(facts: Mapping[str, str]) -> str:
    """A table of names and values, without the values that are not known."""
    rows = "".join(
        f"<tr><th>{_escape(name)}</th><td>{_escape(value)}</td></tr>\n"
        for name, value in facts.items()
        if value
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else "<p>Not recorded.</p>"


def _curves_figure(epochs: Sequence[Mapping[str, Any]], curves: bytes | None) -> str:
    """The curves as an image inside the page, and how long training took."""
    if curves is None:
        return "<p>No curves: <code>metrics.jsonl</code> holds no epochs.</p>"
    seconds = [entry["seconds"] for entry in epochs if is_number(entry.get("seconds"))]
    speeds = sorted(
        entry["images_per_second"] for entry in epochs if is_number(entry.get("images_per_second"))
    )
    caption = [
        f"{len(epochs)} epochs" if len(epochs) != 1 else "1 epoch",
        f"{integer(sum(seconds))} s" if seconds else "",
        f"median {integer(speeds[len(speeds) // 2])} images/s" if speeds else "",
    ]
    image = base64.b64encode(curves).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{image}" '
        'alt="Curves over epochs: loss, accuracy and, with experts, routing">'
        f"<figcaption>{_escape(', '.join(filter(None, caption)))}.</figcaption></figure>"
    )


def _json(value: Any) -> str:
    """Formats a config for reading."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _escape(text: str) -> str:
    """Makes any text safe inside an element or a quoted attribute."""
    return html.escape(str(text), quote=True)
