"""The report of a run: one HTML file with numbers, curves and config, and nothing to download."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import explanation, explanation_figures
from advmoe_jax.evaluation.figures import BLUE, COLOURS, VERMILION, grid, legend_beside, png_of
from advmoe_jax.evaluation.page import (
    escape,
    facts_html,
    figure_html,
    page,
    table_html,
    warnings_html,
)
from advmoe_jax.evaluation.table import (
    DEAD_SHARE,
    AttackRow,
    as_mapping,
    attack_rows,
    explanation_facts,
    integer,
    is_number,
    load_per_expert,
    number,
    percent,
    title,
)

_MAX_LABELLED_EXPERTS = 16


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
    sections = [
        _headline(results),
        "<h2>Accuracy under attack</h2>",
        _results_table(results),
        "<h2>Cost and routing</h2>",
        facts_html(_cost(results)),
        "<h2>Training</h2>",
        _curves_figure(epochs, curves),
        *_explanation(workdir, results, warnings),
        "<h2>Where these numbers come from</h2>",
        facts_html(_provenance(results)),
        f"<details><summary>The whole config</summary><pre>{escape(_json(config))}</pre></details>",
    ]
    name = title(results)
    sections = [f"<h1>{escape(name)}</h1>", *warnings_html(warnings), *sections]
    path.write_text(page(name, sections), encoding="utf-8")
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
    panels: list[Callable[..., None]] = [_draw_loss, _draw_accuracy]
    if _routing_split(epochs):
        panels += [_draw_routing, _draw_entropy]

    def draw_all(figure: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for letter, axes, draw in zip("abcd", all_axes, panels, strict=False):
            grid(axes)
            draw(axes, epochs)
            axes.set_title(f"({letter}) {axes.get_title(loc='left')}")
            legend_beside(axes)
        all_axes[-1].set_xlabel("epoch")
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    return png_of(draw_all, (9.0, 2.9 * len(panels)))


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
        colour = COLOURS[index % len(COLOURS)]
        _plot(axes, epochs, (split, name), color=colour, label=label)
    axes.set(title="Loss", ylabel="loss (nats)")


def _draw_accuracy(axes: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Standard and robust accuracy: colours tell them apart, dashes the split."""
    for name, short, colour in (
        ("standard_accuracy", "SA", BLUE),
        ("robust_accuracy", "RA", VERMILION),
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
            color=COLOURS[expert % len(COLOURS)] if few else "#888888",
            linestyle=":" if few and expert >= len(COLOURS) else "-",
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


def _draw_entropy(axes: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """How undecided the router is; at most the logarithm of the number of experts."""
    split = _routing_split(epochs)
    _plot(axes, epochs, (split, "routing", "entropy"), color=BLUE, label="entropy")
    num_experts = max(len(_load(entry, split)) for entry in epochs)
    axes.axhline(math.log(num_experts), color="#555555", linestyle=(0, (1, 1)), linewidth=1.5,
                 label=f"ln {num_experts}, no preference")  # fmt: skip
    axes.set(
        title=f"Entropy of the router's choice ({'training' if split == 'train' else split})",
        ylabel="entropy (nats)",
    )
    axes.set_ylim(bottom=0)


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
    words = escape(", ".join(filter(None, conditions)))
    return f"<div>{escape(label)}<strong>{shown}</strong><small>{words}</small></div>"


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
    return table_html(list(cells), list(zip(*cells.values(), strict=True)))


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
    alt = "Curves over epochs: loss, accuracy and, with experts, routing"
    return figure_html(curves, alt, f"{', '.join(filter(None, caption))}.")


def _explanation(workdir: Path, results: Mapping[str, Any], warnings: list[str]) -> list[str]:
    """What the command explain found of the same checkpoint; nothing if it was not given.

    Appends to `warnings` if it is of another checkpoint.
    """
    path = workdir / explanation.FILE
    try:
        found = as_mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.append(f"{path.name} cannot be read ({error}) and is left out")
        return []
    if found.get("evaluated") != results.get("evaluated"):
        warnings.append(
            f"{path.name} is of another checkpoint than the results and is left out: run "
            f"`python -m advmoe_jax.explain --workdir={workdir}`"
        )
        return []
    figures = [
        figure_html((workdir / name).read_bytes(), caption, caption)
        for name, caption in explanation_figures.CAPTIONS.items()
        if (workdir / name).is_file()
    ]
    heading = "Routing explained" if found.get("routing") else "Explained"
    return [f"<h2>{heading}</h2>", facts_html(explanation_facts(found)), *figures]


def _json(value: Any) -> str:
    """Formats a config for reading."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
