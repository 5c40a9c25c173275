"""Figures of an explanation: each takes plain numbers and gives a PNG."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.evaluation.explanation import Seen, choose_examples
from advmoe_jax.reports.figures import BLUE, COLOURS, VERMILION, grid, legend_beside, png_of
from advmoe_jax.reports.table import radius

_MAX_TICKS = 25
_MAX_BARS = 40
_SHOWN = 8  # images in the grid

# What a report says of each figure, in the order in which it shows them.
CAPTIONS = {
    "load_per_class.png": "Where the images of each class go.",
    "routes.png": "Routes of the same images before and after the attack.",
    "pathways.png": "Dashed in (a): the network with its own routes. In (b) the image and the "
    "route are taken from the clean or from the attacked pass, each by itself; the last two bars "
    "are of an attack that looks at the router alone.",
    "epsilon.png": "PGD at growing radii; its step grows with the radius.",
    "images.png": "Images that show what the attack does: where route and prediction change, only "
    "one of them, or neither. Below each image: prediction and route.",
}


def explanation_figures(
    explanation: Mapping[str, Any], seen: Seen, images: np.ndarray
) -> dict[str, bytes]:
    """Every figure of an explanation by the name of its file, of ``CAPTIONS``.

    Args:
        explanation: the content of ``explanation.json``.
        seen: what became of the images.
        images: uint8 [n, H, W, C].
    """
    attack, names = explanation["attack"]["name"], explanation["class_names"]
    curve, routing = explanation["curve"], explanation["routing"]
    figures = {
        "epsilon.png": accuracy_against_epsilon(
            {"this run": (curve["epsilon"], curve["accuracy"])},
            curve["attack"]["norm"],
            explanation["attack"]["epsilon"],
        ),
        "images.png": image_grid(images, seen, choose_examples(seen, _SHOWN), names, attack),
    }
    if routing is None:
        return figures
    return figures | {
        "load_per_class.png": load_per_class({"": routing["load_per_class"]}, names),
        "routes.png": routes(routing, attack),
        "pathways.png": pathways(routing, attack, explanation["router_attack"]),
    }


def load_per_class(
    networks: Mapping[str, Sequence[Sequence[float] | None]], class_names: Sequence[str]
) -> bytes:
    """Stacked bars: where the images of each class go; one panel for each network.

    Args:
        networks: by title, shares [C][N] in [0, 1].
        class_names: of the C classes.
    """
    columns = 1 if len(networks) == 1 else 2
    rows = -(-len(networks) // columns)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (title, shares) in zip(all_axes, networks.items(), strict=False):
            _stacked_bars(axes, shares)
            axes.set_title(title)
        for axes in all_axes[len(networks) :]:
            axes.remove()
        for axes in all_axes[: len(networks)]:
            if axes.get_subplotspec().is_last_row() or len(networks) - columns < columns:
                _class_ticks(axes, class_names)
            if axes.get_subplotspec().is_first_col():
                axes.set_ylabel("share of the class's\nimages (%)")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)

    return png_of(draw, (9.0, 3.4 if rows == 1 else 0.8 + 2.5 * rows))


def _stacked_bars(axes: Any, shares: Sequence[Sequence[float] | None]) -> None:
    known = [np.asarray(row) for row in shares if row is not None]
    num_experts = len(known[0]) if known else 0
    table = 100 * np.asarray([np.zeros(num_experts) if r is None else r for r in shares])
    bottom = np.zeros(len(table))
    for expert in range(num_experts):
        top = bottom + table[:, expert]
        style = {
            "color": COLOURS[expert % len(COLOURS)],
            "hatch": ("", "//", "..", "xx")[expert // len(COLOURS) % 4],
            "edgecolor": "white",
            "label": f"expert {expert}",
        }
        if len(table) <= _MAX_BARS:
            axes.bar(np.arange(len(table)), table[:, expert], bottom=bottom, linewidth=0.6, **style)
        else:  # one area instead of hundreds of bars
            edges = np.arange(len(table) + 1) - 0.5
            low, high = (np.append(y, y[-1:]) for y in (bottom, top))
            axes.fill_between(edges, low, high, step="post", linewidth=0, **style)
        bottom = top
    axes.set(ylim=(0, 100), xlim=(-0.6, len(table) - 0.4))


def _class_ticks(axes: Any, class_names: Sequence[str]) -> None:
    step = -(-len(class_names) // _MAX_TICKS)
    shown = range(0, len(class_names), step)
    names = [class_names[i] for i in shown]
    axes.set_xticks(list(shown), labels=names)
    axes.tick_params(axis="x", labelbottom=True)
    if max(map(len, names)) > 2:
        axes.tick_params(axis="x", labelrotation=45)
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axes.set_xlabel("class" if step == 1 else f"class (every {step}th is named)")


def routes(routing: Mapping[str, Any], attack: str) -> bytes:
    """Confusion of routes, and agreement layer by layer where layers are routed by themselves."""
    agreement = routing["agreement"]
    by_layer = len(agreement) > 1

    def draw(figure: Any) -> None:
        left, *right = figure.subplots(1, 2 if by_layer else 1, squeeze=False)[0]
        image = _confusion(left, 100 * np.asarray(routing["confusion"]))
        left.set(
            xlabel=f"expert under {attack}",
            ylabel="expert, clean",
            title="(a) Routes before and after" if by_layer else "Routes before and after",
        )
        figure.colorbar(image, ax=left, label="share of first choices (%)")
        for axes in right:
            grid(axes)
            axes.bar(np.arange(len(agreement)), 100 * np.asarray(agreement), color=BLUE)
            axes.set(
                title="(b) Agreement, layer by layer",
                xlabel="MoE layer, from the image on",
                ylabel=f"routes that survive {attack} (%)",
                ylim=(0, 101),
            )

    return png_of(draw, (9.0, 3.6) if by_layer else (5.0, 4.0))


def _confusion(axes: Any, shares: np.ndarray) -> Any:
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=max(shares.max(), 1e-9))
    axes.set_xticks(range(len(shares)))
    axes.set_yticks(range(len(shares)))
    if len(shares) <= 8:
        for (row, column), share in np.ndenumerate(shares):
            dark = share > 0.6 * shares.max()
            axes.text(column, row, f"{share:.1f}", ha="center", va="center",
                      color="white" if dark else "black")  # fmt: skip
    return image


def pathways(routing: Mapping[str, Any], attack: str, router_attack: Mapping[str, Any]) -> bytes:
    """Accuracy of every single pathway, and what the route and the image cost, each by itself.

    Args:
        routing: see ``explanation.describe``, under ``attack``.
        attack: its name.
        router_attack: the same under an attack on the router alone, and its ``name``.
    """

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
        own = routing["accuracy"]
        clean, attacked = (routing["pathways"][x] for x in ("clean", "attacked"))
        x = np.arange(len(clean))
        for offset, name, values, colour in (
            (-0.2, "clean images", clean, BLUE),
            (0.2, f"{attack} images", attacked, VERMILION),
        ):
            bars = left.bar(x + offset, 100 * np.asarray(values), 0.38, color=colour, label=name)
            if len(clean) <= 4:
                left.bar_label(bars, fmt="%.1f", padding=1, fontsize=9)
        for value, colour, style in (
            (own["clean"]["clean_route"], BLUE, "--"),
            (own["attacked"]["attacked_route"], VERMILION, "--"),
        ):
            left.axhline(100 * value, color=colour, linestyle=style, linewidth=1.3)
        left.plot([], [], "--", color="#555555", label="as routed")
        left.set_xticks(x, labels=[f"expert {i}" for i in x] if len(x) <= 4 else list(map(str, x)))
        left.set(title="(a) All images along one pathway", ylabel="accuracy (%)", ylim=(0, 112))
        left.set_xlabel("pathway" if len(x) > 4 else "")
        left.set_yticks(range(0, 101, 20))

        bars = {
            "clean image,\nclean route": own["clean"]["clean_route"],
            f"clean image,\n{attack} route": own["clean"]["attacked_route"],
            f"{attack} image,\nclean route": own["attacked"]["clean_route"],
            f"{attack} image\nand route": own["attacked"]["attacked_route"],
            f"{router_attack['name']} image,\nclean route": router_attack["accuracy"]["attacked"][
                "clean_route"
            ],
            f"{router_attack['name']} image\nand route": router_attack["accuracy"]["attacked"][
                "attacked_route"
            ],
        }
        colours = [BLUE, COLOURS[5], COLOURS[4], VERMILION, COLOURS[3], COLOURS[7]]
        drawn = right.bar(range(len(bars)), [100 * v for v in bars.values()], color=colours)
        right.bar_label(drawn, fmt="%.1f", padding=1, fontsize=9)
        right.set_xticks(range(len(bars)), labels=bars, rotation=45, ha="right", fontsize=9)
        right.set(title="(b) What the image and the route cost")
        for axes in (left, right):
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)

    return png_of(draw, (9.0, 4.6))


def accuracy_against_epsilon(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    norm: str,
    epsilon: float,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> bytes:
    """Lines of RA over the radius of the ball.

    Args:
        curves: by name, radii in units of the pixel range and accuracies in [0, 1].
        norm: of the ball.
        epsilon: the radius of the run's attacks, marked.
        styles: by name, settings of matplotlib's plot.
    """
    styles = styles or {name: {"color": BLUE, "marker": "o"} for name in curves}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        grid(axes)
        for name, (radii, accuracies) in curves.items():
            axes.plot(radii, 100 * np.asarray(accuracies), label=name, markersize=5, **styles[name])
        axes.axvline(epsilon, color="#555555", linestyle=":", linewidth=1.3)
        axes.annotate(
            "the run's epsilon", (epsilon, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
            textcoords="offset points", ha="left", va="top", color="#444444", fontsize=9,
        )  # fmt: skip
        ticks = sorted({x for radii, _ in curves.values() for x in radii})
        axes.set_xticks(ticks, labels=[radius(x) for x in ticks])
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
        axes.set(
            xlabel=f"epsilon ({norm}, pixel range [0, 1])",
            ylabel="robust accuracy (%)",
            ylim=(0, 101),
        )
        if len(curves) > 1:
            legend_beside(axes)

    return png_of(draw, (8.0, 4.2) if len(curves) > 1 else (6.0, 3.8))


def image_grid(
    images: np.ndarray,
    seen: Seen,
    chosen: Sequence[int],
    class_names: Sequence[str],
    attack: str,
) -> bytes:
    """Columns of image, perturbation and attacked image, with routes and predictions beside.

    Args:
        images: uint8 [n, H, W, C].
        seen: what became of them.
        chosen: indices of the images to show.
        class_names: of the labels.
        attack: its name.
    """
    clean = images[list(chosen)] / 255.0
    adversarial = seen.adversarial[list(chosen)]
    delta = adversarial - clean
    factor = amplification(np.abs(delta).max())

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(3, len(chosen), squeeze=False)
        panels = (clean, 0.5 + factor * delta, adversarial)
        titles = ("clean", f"perturbation\n× {factor:g} (grey: 0)", attack)
        for row, (panel, title) in enumerate(zip(panels, titles, strict=True)):
            all_axes[row, 0].set_ylabel(title)
            for axes, image in zip(all_axes[row], panel, strict=True):
                _show(axes, image)
        for column, i in enumerate(chosen):
            wrong = seen.attacked[i] != seen.labels[i]
            _caption(all_axes[0, column], class_names, seen.clean[i], seen.routes, i, False)
            _caption(all_axes[2, column], class_names, seen.attacked[i], seen.attacked_routes, i,
                     wrong)  # fmt: skip
            all_axes[0, column].set_title(f"label:\n{class_names[seen.labels[i]]}", loc="center",
                                          fontsize=9)  # fmt: skip

    return png_of(draw, (1.15 * len(chosen) + 0.9, 5.0))


def amplification(largest: float) -> float:
    """A round factor that brings the perturbation near half of the pixel range."""
    if largest <= 0:
        return 1.0
    steps = (1, 2, 5, 10, 20, 50, 100)
    return float(max((s for s in steps if s * largest <= 0.5 + 1e-6), default=1))


def _show(axes: Any, image: np.ndarray) -> None:
    image = np.clip(image, 0, 1)
    grey = image.shape[-1] == 1
    axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None, vmin=0, vmax=1,
                interpolation="nearest")  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)


def _caption(
    axes: Any,
    class_names: Sequence[str],
    prediction: int,
    routes: np.ndarray | None,
    index: int,
    wrong: bool,
) -> None:
    name = class_names[prediction]
    gap = " " if len(name) <= 4 and not wrong else "\n"
    text = f"seen as{gap}{name}{' (wrong)' if wrong else ''}"
    if routes is not None:
        text += f"\n{_route(routes[index, :, 0])}"
    axes.set_xlabel(text, fontsize=9, color=VERMILION if wrong else "black")


def _route(experts: np.ndarray) -> str:
    if len(experts) == 1:
        return f"expert {experts[0]}"
    text = "".join(map(str, experts)) if experts.max() < 10 else "-".join(map(str, experts))
    return f"experts\n{text}" if len(text) <= 14 else f"experts\n{text[:12]}…"
