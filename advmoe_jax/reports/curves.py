"""A run's curves over epochs: loss, accuracy and, for a mixture of experts, routing."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.reports.figures import BLUE, COLOURS, VERMILION, grid, legend_beside, png_of
from advmoe_jax.reports.table import as_mapping, is_number
from advmoe_jax.routing.measures import COLLAPSED

_MAX_LABELLED_EXPERTS = 16
_PANEL = (9.0, 2.9)  # width and height in inches


def curves(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """The PNG of a run's curves.

    Args:
        epochs: of ``metrics.jsonl``, at least one; any key but ``epoch`` may be missing.
    """
    width, height = _PANEL
    size = (width, height * len(_panels(epochs)))
    return png_of(lambda figure: draw_curves(figure, epochs), size)


def draw_curves(figure: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Draws what ``curves`` shows on a figure of matplotlib, one panel below the other."""
    from matplotlib.ticker import MaxNLocator

    panels = _panels(epochs)
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for letter, axes, draw in zip("abcd", all_axes, panels, strict=False):
        grid(axes)
        draw(axes, epochs)
        axes.set_title(f"({letter}) {axes.get_title(loc='left')}")
        legend_beside(axes)
    all_axes[-1].set_xlabel("epoch")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _panels(epochs: Sequence[Mapping[str, Any]]) -> list[Callable[..., None]]:
    routing = [_draw_routing, _draw_entropy] if _routing_split(epochs) else []
    return [_draw_loss, _draw_accuracy, *routing]


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
    axes.axhline(100 * COLLAPSED, color="#B00020", linestyle=(0, (1, 1)), linewidth=1.5,
                 label=f"{100 * COLLAPSED:g}% warning")  # fmt: skip
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
    return np.sign(values) * np.abs(values) ** exponent


def _plot(
    axes: Any,
    epochs: Sequence[Mapping[str, Any]],
    keys: Sequence[str | int],
    scale: float = 1,
    **style: Any,
) -> None:
    """Plots ``entry[keys[0]][keys[1]]...`` over epochs, for the epochs that have it."""
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
    """Whose routing to show: ``validation`` if any epoch has it, else ``train``; None if dense."""
    for split in ("validation", "train"):
        if any(_load(entry, split) for entry in epochs):
            return split
    return None


def _load(entry: Mapping[str, Any], split: str) -> Sequence[float]:
    """Load per expert of one epoch; empty if it was not recorded."""
    load = as_mapping(as_mapping(entry.get(split)).get("routing")).get("load")
    return load if isinstance(load, list) else []
