"""The results of an evaluation as a table for the terminal, and the rows that reports share.

Everything printed is ASCII and needs no colour, so that it survives a pipe, a log and any locale.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from advmoe_jax.reports.token_routes import token_facts
from advmoe_jax.routing.measures import COLLAPSED

# A rule below the header and no more: eight columns do not leave room for lines between them.
_BOX = box.Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)


class AttackRow(NamedTuple):
    """What one row of a results table shows, as text; empty where it was not recorded."""

    attack: str
    accuracy: str  # %
    norm: str
    epsilon: str
    steps: str  # steps x step size
    restarts: str
    agreement: str  # %, images routed alike clean and attacked
    images_per_second: str
    mean_macs: str = ""  # millions per image, of a network that images leave early


def results_table(results: Mapping[str, Any]) -> Table:
    """Makes the table of accuracies: one row for clean images and one per attack.

    Args:
        results: the content of ``results.json``; any key may be missing.

    Returns:
        A table that fits into 80 columns. Columns that would be empty (router agreement of a dense
        network) are left out.
    """
    headers = {
        "attack": "attack",
        "accuracy": "accuracy\n%",
        "norm": "norm",
        "epsilon": "epsilon",
        "steps": "steps x\nstep size",
        "restarts": "restarts",
        "agreement": "router\nagree-\nment %",
        "mean_macs": "mean\nMMACs",
        "images_per_second": "images\n/s",
    }
    rows = attack_rows(results)
    # ``Text``, because an attack or data set called "[bold]" must not be read as markup.
    table = Table(
        title=Text(", ".join(filter(None, [title(results), _count(results)]))),
        title_justify="left",
        title_style="",
        header_style="",
        box=_BOX,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),  # and one column for the box's (blank) divider
    )
    shown = [
        name
        for name in headers
        if name in ("attack", "accuracy") or any(getattr(row, name) for row in rows)
    ]
    for name in shown:
        left = name in ("attack", "norm")
        table.add_column(
            headers[name], justify="left" if left else "right", overflow="fold", vertical="bottom"
        )
    for row in rows:
        table.add_row(*(Text(getattr(row, name)) for name in shown))
    return table


def certified(routing: Mapping[str, Any]) -> str:
    """The share of routes that are proved, and within which ball; empty if it is not known."""
    share, ball = percents([routing.get("certified_agreement")]), routing.get("certified_within")
    if not share or not isinstance(ball, list) or len(ball) != 2 or not radius(ball[1]):
        return share
    return f"{share} within {ball[0]} {radius(ball[1])}"


def print_results(
    results: Mapping[str, Any], console: Console | None = None, path: Path | None = None
) -> None:
    """Prints the results table, and below it what the numbers were measured on.

    Args:
        results: the content of ``results.json``; any key may be missing.
        console: where to print; standard output if None.
        path: where the results were saved; its line is left out if None.
    """
    console = console or Console()
    console.print(results_table(results))
    lines = {
        "load per expert": load_per_expert(results),
        "routing entropy": number(as_mapping(results.get("routing")).get("entropy"), " nats"),
        "certified routes": certified(as_mapping(results.get("routing"))),
        "parameters": integer(results.get("num_params")),
        "MACs per image": integer(results.get("macs_per_image")),
        **exit_facts(results),
        "examples": _examples(results),
        "seed": str(results.get("seed", "")),
        "device": results.get("device"),
        "commit": str(results.get("git_commit") or "")[:12],
        # Of the weights that training ended with; below, of those that the accuracies are of.
        "params sha256": _sha256(results)[:12],
        "evaluated sha256": _evaluated_sha256(results)[:12],
    }
    below = Table.grid(padding=(0, 2))
    for name, value in [
        *lines.items(),
        *(("warning", warning) for warning in results.get("warnings") or []),
    ]:
        if value:
            below.add_row(Text(name), Text(str(value)))
    console.print()
    console.print(below)
    if path:
        # Not in the grid, and not wrapped: a broken path cannot be copied.
        console.print(Text(f"results in {path}"), soft_wrap=True)


def explanation_facts(found: Mapping[str, Any]) -> dict[str, str]:
    """The gist of an explanation, by what it is.

    Args:
        found: the content of ``explanation.json``; any key may be missing.
    """
    attack, routing = as_mapping(found.get("attack")), as_mapping(found.get("routing"))
    name, on_router = attack.get("name", "attack"), as_mapping(found.get("router_attack"))
    count = integer(found.get("examples"))
    conditions = [
        str(name),
        str(attack.get("norm") or ""),
        f"epsilon {radius(attack['epsilon'])}" if radius(attack.get("epsilon")) else "",
        f"{count} images" if count else "",
    ]
    facts = {
        "Attack": ", ".join(filter(None, conditions)),
        "Load per expert": percents(routing.get("load")),
        "Routes that survive": percents(routing.get("agreement")),
        "Routes that no attack can change (proved)": certified(routing),
    }
    for what, of in (("clean", "clean"), ("attacked", str(name))):
        pathways = as_mapping(routing.get("pathways")).get(what)
        facts[f"Accuracy along each pathway, {of} images"] = percents(pathways)
    accuracy = as_mapping(routing.get("accuracy"))
    facts |= {
        f"Accuracy on {of} images, {route.replace('_', ' ')}": percents([value])
        for what, of in (("clean", "clean"), ("attacked", str(name)))
        for route, value in as_mapping(accuracy.get(what)).items()
    }
    alone = as_mapping(as_mapping(on_router.get("accuracy")).get("attacked"))
    facts |= {
        f"Routes that survive {on_router.get('name')}": percents(on_router.get("agreement")),
        f"Accuracy under {on_router.get('name')}, which looks at the router alone": percents(
            [alone.get("attacked_route")]
        ),
        f"The same on {on_router.get('name')} images along their clean routes": percents(
            [alone.get("clean_route")]
        ),
    }
    return {name: text for name, text in facts.items() if text} | token_facts(found)


def percents(shares: Any) -> str:
    """Shares as text, e.g. ``50.2%, 49.8%``; empty if there are none."""
    known = [percent(share) for share in shares or [] if is_number(share)]
    return ", ".join(f"{share}%" for share in known)


def print_explanation(found: Mapping[str, Any], console: Console) -> None:
    """Prints the gist of an explanation, the content of ``explanation.json``."""
    below = Table.grid(padding=(0, 2))
    for name, value in explanation_facts(found).items():
        below.add_row(Text(name), Text(value))
    console.print(below)


def title(results: Mapping[str, Any]) -> str:
    """Names a run: method, model, data set, as far as they are known."""
    names = [str(results[key]) for key in ("method", "model") if results.get(key)]
    dataset = f"on {results['dataset']}" if results.get("dataset") else ""
    return ", ".join(names) + f" {dataset}".rstrip() if names else dataset or "unnamed run"


def attack_rows(results: Mapping[str, Any]) -> list[AttackRow]:
    """Makes one row for clean images and one per attack, in the order of ``robust_accuracy``."""
    accuracies = {
        "clean": results.get("standard_accuracy"),
        **as_mapping(results.get("robust_accuracy")),
        **as_mapping(results.get("standard_accuracy_on_fewer")),
    }
    attacks, speeds = as_mapping(results.get("attacks")), results.get("images_per_second")
    agreement = as_mapping(as_mapping(results.get("routing")).get("agreement"))
    under = as_mapping(as_mapping(results.get("exits")).get("under"))
    return [
        _attack_row(
            name,
            accuracy,
            as_mapping(attacks.get(name)) if name != "clean" else {},
            agreement.get(name) if name != "clean" else None,
            as_mapping(speeds).get(name),
            as_mapping(as_mapping(under.get(name)).get("macs")).get("every"),
        )
        for name, accuracy in accuracies.items()
    ]


def _attack_row(
    name: str, accuracy: Any, attack: Mapping[str, Any], agreement: Any, speed: Any, macs: Any
) -> AttackRow:
    """Formats one row."""
    steps, step_size = attack.get("num_steps"), radius(attack.get("step_size"))
    steps = f"{steps:d}" if isinstance(steps, int) else ""
    return AttackRow(
        attack=name,
        accuracy=percent(accuracy),
        norm=str(attack.get("norm") or ""),
        epsilon=radius(attack.get("epsilon")),
        steps=f"{steps} x {step_size}" if steps and step_size else steps,
        restarts=integer(attack.get("restarts")),
        agreement=percent(agreement),
        images_per_second=integer(speed) if is_number(speed) and speed >= 100 else number(speed),
        mean_macs=f"{macs / 1e6:.2f}" if is_number(macs) else "",
    )


def exit_facts(results: Mapping[str, Any]) -> dict[str, str]:
    """What is told of a network that images leave early, by what it is; {} for others."""
    exits = as_mapping(results.get("exits"))
    clean = as_mapping(as_mapping(exits.get("under")).get("clean"))
    facts = {
        "thresholds": ", ".join(number(x) for x in exits.get("thresholds") or []),
        "chosen by": f"{exits.get('rule')}, on {exits.get('chosen_on')}" if exits else "",
        "share per exit": percents(clean.get("share")),
        "each exit alone": percents(clean.get("accuracy")),
    }
    return {name: text for name, text in facts.items() if text}


def load_per_expert(results: Mapping[str, Any]) -> str:
    """Shares of the images as text, ``0: 50.2%, 1: 49.8%`` say; unused experts are pointed out."""
    load = as_mapping(results.get("routing")).get("load") or []
    shares = [
        f"{expert}: {percent(share)}%" + (" (unused)" if share < COLLAPSED else "")
        for expert, share in enumerate(load)
        if is_number(share)
    ]
    return ", ".join(shares)


def _sha256(results: Mapping[str, Any]) -> str:
    return str(results.get("params_sha256") or "")


def _evaluated_sha256(results: Mapping[str, Any]) -> str:
    """The digest of the weights that were evaluated; empty if they are the last ones."""
    sha256 = _sha256(as_mapping(results.get("evaluated")))
    return "" if sha256 == _sha256(results) else sha256


def _count(results: Mapping[str, Any]) -> str:
    """The number of images that the standard accuracy is of, in words."""
    clean = as_mapping(as_mapping(results.get("attacks")).get("clean"))
    count = integer(clean.get("examples"))
    return f"{count} images" if count else ""


def _examples(results: Mapping[str, Any]) -> str:
    """Number of images, once if all attacks saw as many."""
    counts = {
        name: integer(as_mapping(attack).get("examples"))
        for name, attack in as_mapping(results.get("attacks")).items()
    }
    if len(set(counts.values())) == 1:
        return next(iter(counts.values()))
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def percent(share: Any) -> str:
    """Formats a share in [0, 1] as a percentage with one decimal; empty if it is no number."""
    return f"{100 * share:.1f}" if is_number(share) else ""


def integer(value: Any) -> str:
    """Formats a count with thousands separators; empty if it is no number."""
    return f"{round(value):,}" if is_number(value) else ""


def number(value: Any, unit: str = "") -> str:
    """Formats a measurement to three digits; empty if it is no number."""
    return f"{value:.3g}{unit}" if is_number(value) else ""


def radius(value: Any) -> str:
    """Formats an epsilon or step size as papers do, ``8/255`` or ``0.2``; empty if no number."""
    if not is_number(value):
        return ""
    decimal, levels = f"{value:.4g}", 255 * value
    if not math.isclose(float(decimal), value, rel_tol=1e-6):
        for part in (levels, 2 * levels, 4 * levels):  # 2.5/255 is a customary step size
            if round(part) and math.isclose(part, round(part), rel_tol=1e-5):
                return f"{round(part) / (part / levels):g}/255"
    return decimal


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number (JSON written by Python may hold NaN)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
