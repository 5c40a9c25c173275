"""The report of a run: one HTML file with numbers, curves and config, and nothing to download."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.explanation import FILE as EXPLANATION
from advmoe_jax.files import read_json_lines, write_bytes, write_text
from advmoe_jax.metrics import METRICS, epochs_of
from advmoe_jax.reports import exit_examples
from advmoe_jax.reports.curves import curves
from advmoe_jax.reports.explanation import CAPTIONS
from advmoe_jax.reports.page import (
    escape,
    facts_html,
    figure_html,
    page,
    table_html,
    warnings_html,
)
from advmoe_jax.reports.table import (
    AttackRow,
    as_mapping,
    attack_rows,
    certified,
    explanation_facts,
    integer,
    is_number,
    load_per_expert,
    number,
    percent,
    title,
)
from advmoe_jax.reports.token_routes import TOKEN_CAPTIONS


def write_report(workdir: Path, out: Path | None = None) -> Path:
    """Writes ``curves.png`` and a self-contained ``report.html`` about the run in ``workdir``.

    Reads ``results.json``, and ``config.json`` and ``metrics.jsonl`` as far as they exist: without
    metrics there are no curves, and what could not be read is said in the report.

    Args:
        workdir: the run's directory.
        out: where the results lie and the report is written; None: in the run's directory.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: ``results.json`` is missing or damaged.
    """
    out = out or workdir
    results = _read_results(out / "results.json")
    warnings = [str(warning) for warning in results.get("warnings") or []]
    config = _read_config(workdir / "config.json", results, warnings)
    epochs = _read_epochs(workdir / METRICS, warnings)
    png = curves(epochs) if epochs else None
    if png:
        write_bytes(out / "curves.png", png)
    sections = [
        _headline(results),
        "<h2>Accuracy under attack</h2>",
        _results_table(results),
        "<h2>Cost and routing</h2>",
        facts_html(_cost(results)),
        *_figures_in(
            out, {exit_examples.FILE: exit_examples.CAPTION} if results.get("exits") else {}
        ),
        "<h2>Training</h2>",
        _curves_figure(epochs, png),
        *_explanation(workdir, results, warnings),
        "<h2>Where these numbers come from</h2>",
        facts_html(_provenance(results)),
        f"<details><summary>The whole config</summary><pre>{escape(_json(config))}</pre></details>",
    ]
    name = title(results)
    sections = [f"<h1>{escape(name)}</h1>", *warnings_html(warnings), *sections]
    return write_text(out / "report.html", page(name, sections))


# --- reading -----------------------------------------------------------------------------------


def _read_results(path: Path) -> dict[str, Any]:
    """Reads ``results.json``; raises UserError, naming it, if it is missing or no JSON object."""
    again = f"run `python -m advmoe_jax.evaluate --workdir={path.parent}` to write it"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {again}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {again} anew") from None
    if not isinstance(results, dict):
        raise UserError(f"{path} does not hold a JSON object: {again} anew")
    return results


def _read_config(path: Path, results: Mapping[str, Any], warnings: list[str]) -> Any:
    """What ``config.json`` or else the results hold; appends to ``warnings`` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        warnings.append(
            f"{path.name} cannot be read ({error}); the config in results.json is shown"
        )
    return results.get("config")


def _read_epochs(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """The epochs of ``metrics.jsonl``; appends to ``warnings`` if lines cannot be read."""
    entries, damaged = read_json_lines(path)
    if damaged:
        warnings.append(f"{damaged} line(s) of {path.name} cannot be read and are left out")
    return epochs_of(entries)


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
        # Of the run's own threat model, and of the network as it is: see docs/attacks.md.
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
        "Certified routes": certified(as_mapping(results.get("routing"))),
    }


def _provenance(results: Mapping[str, Any]) -> dict[str, str]:
    """What one needs to obtain the numbers again."""
    versions = as_mapping(results.get("versions"))
    return {
        "Training steps": integer(results.get("steps")),
        "Training seed": str(results.get("seed", "")),
        "Device": str(results.get("device") or ""),
        "Commit": str(results.get("git_commit") or ""),
        "SHA-256 of the last parameters": str(results.get("params_sha256") or ""),
        "SHA-256 of the evaluated parameters": str(
            as_mapping(results.get("evaluated")).get("params_sha256") or ""
        ),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _curves_figure(epochs: Sequence[Mapping[str, Any]], png: bytes | None) -> str:
    """The curves as an image inside the page, and how long training took."""
    if png is None:
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
    return figure_html(png, alt, f"{', '.join(filter(None, caption))}.")


def _explanation(workdir: Path, results: Mapping[str, Any], warnings: list[str]) -> list[str]:
    """What the command explain found of the same checkpoint; nothing if it was not given.

    Appends to ``warnings`` if it is of another checkpoint.
    """
    path = workdir / EXPLANATION
    try:
        found = as_mapping(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        warnings.append(f"{path.name} cannot be read ({error}) and is left out")
        return []
    of_explanation, of_results = (as_mapping(x.get("evaluated")) for x in (found, results))
    if of_explanation.get("params_sha256") != of_results.get("params_sha256"):
        warnings.append(
            f"{path.name} is of another checkpoint than the results and is left out: run "
            f"`python -m advmoe_jax.explain --workdir={workdir}`"
        )
        return []
    figures = _figures_in(workdir, CAPTIONS | TOKEN_CAPTIONS)
    heading = "Routing explained" if found.get("routing") else "Explained"
    return [f"<h2>{heading}</h2>", facts_html(explanation_facts(found)), *figures]


def _figures_in(directory: Path, captions: Mapping[str, str]) -> list[str]:
    """Those figures that are there."""
    return [
        figure_html((directory / name).read_bytes(), caption, caption)
        for name, caption in captions.items()
        if (directory / name).is_file()
    ]


def _json(value: Any) -> str:
    """Formats a config for reading."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
