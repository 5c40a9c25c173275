"""Figures of token routes: where in the image they change, and what exchanged experts cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.evaluation.explanation import Seen, choose_examples
from advmoe_jax.reports.figures import BLUE, VERMILION, grid, png_of
from advmoe_jax.routing import measures

_SHOWN = 6  # images with maps of their own
_MOST_LAYERS = 6

# What a report says of each figure.
TOKEN_CAPTIONS = {
    "route_maps.png": "Share of the experts exchanged by the attack (1 - intersection over union), "
    "layer by layer, where the patches lie in the image: first the mean of all images, then some "
    "images. In the title: mean of the patches, and the class token's own.",
    "exchange.png": "Accuracy if experts are exchanged at test time. next_best and random: others "
    "stand in for the chosen ones, with their weights; without e: expert e is not there; top k: "
    "each token takes k experts.",
}


def token_facts(found: Mapping[str, Any]) -> dict[str, str]:
    """The gist of what is told of a transformer besides, by what it is.

    Args:
        found: the content of ``explanation.json``; any key may be missing.
    """
    facts = {}
    if "prediction_changes" in found:
        facts["Predictions that change"] = _percent(found["prediction_changes"])
    slope = found.get("lipschitz", {})
    for name, title in (
        ("slope", "Slope of the margin at the images"),
        ("slope_in_ball", "Steepest slope found in the ball"),
        ("observed", "Slope between image and attack"),
        ("observed_along_clean_routes", "The same along the clean routes"),
    ):
        if name in slope:
            facts[title] = (
                f"median {slope[name]['median']:.3g}, largest {slope[name]['largest']:.3g}"
            )
    if "margin" in slope.get("jumps", {}):
        jump = slope["jumps"]["margin"]
        facts["Jump of the margin at a boundary between routes"] = (
            f"median {jump['median']:.3g}, largest {jump['largest']:.3g}"
        )
    tokens = found.get("tokens")
    if tokens is None:
        return facts
    frozen = tokens["frozen"]
    return facts | {
        "Experts exchanged by the attack, layer by layer": ", ".join(
            map(_percent, tokens["changes"]["layers"])
        ),
        "Accuracy under an attack on frozen clean routes, held on them": _percent(
            frozen["on_clean_routes"]
        ),
        "Accuracy on its images along their own routes": _percent(frozen["on_free_routes"]),
        "Clean accuracy with next best / random experts": " / ".join(
            _percent(tokens["exchange"][name]["clean"]["accuracy"])
            for name in ("next_best", "random")
        ),
        "Predictions that change with the neighbours in the batch": _percent(
            tokens["neighbours"]["predictions"]
        ),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def token_figures(
    explanation: Mapping[str, Any], seen: Seen, images: np.ndarray
) -> dict[str, bytes]:
    """Every figure by the name of its file, of ``TOKEN_CAPTIONS``; none without token routes.

    Args:
        explanation: the content of ``explanation.json``.
        seen: what became of the images.
        images: uint8 [n, H, W, C].
    """
    tokens = explanation.get("tokens")
    if tokens is None:
        return {}
    attack = explanation["attack"]["name"]
    shape = tokens["grid"], tokens["has_class_token"]
    return {
        "route_maps.png": route_maps(tokens["changes"], seen, images, *shape, attack),
        "exchange.png": exchanges(tokens["exchange"], attack),
    }


def route_maps(
    changes: Mapping[str, Any],
    seen: Seen,
    images: np.ndarray,
    shape: Sequence[int],
    has_class_token: bool,
    attack: str,
) -> bytes:
    """Maps of route changes: a row for the mean of all images, and one for each of some images.

    Args:
        changes: see ``token_routes.changes``.
        seen: what became of the images.
        images: uint8 [n, H, W, C].
        shape: patches in a column and in a row of an image.
        has_class_token: whether the first token is none of them.
        attack: its name.
    """
    mean = np.asarray(changes["tokens"])
    layers = np.unique(np.linspace(0, len(mean) - 1, min(len(mean), _MOST_LAYERS)).astype(int))
    changed = 1 - measures.overlap(seen.routes, seen.attacked_routes)
    changed = changed.reshape(len(changed), *mean.shape)
    chosen = choose_examples(seen, _SHOWN)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(1 + len(chosen), 1 + len(layers), squeeze=False)
        for row, values in enumerate([mean, *changed[list(chosen)]]):
            axes = all_axes[row, 0]
            if row:
                _picture(axes, seen.adversarial[chosen[row - 1]])
            else:
                axes.text(0.5, 0.5, f"mean of\n{len(changed)} images", ha="center", va="center")
                axes.set_axis_off()
            for column, layer in enumerate(layers, 1):
                axes, patches = all_axes[row, column], values[layer][int(has_class_token) :]
                shown = axes.imshow(100 * patches.reshape(shape), cmap="magma", vmin=0, vmax=100)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 0:
                    token = f"class token {100 * values[layer][0]:.0f}%" if has_class_token else ""
                    axes.set_title(
                        f"MoE layer {layer}: {100 * patches.mean():.0f}%\n{token}", fontsize=9
                    )
        figure.colorbar(shown, ax=all_axes, shrink=0.5, label=f"experts exchanged by {attack} (%)")

    return png_of(draw, (1.4 * (1 + len(layers)) + 1.2, 1.35 * (1 + len(chosen))))


def _picture(axes: Any, image: np.ndarray) -> None:
    grey = image.shape[-1] == 1
    image = np.clip(image[..., 0] if grey else image, 0, 1)
    axes.imshow(image, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def exchanges(exchange: Mapping[str, Any], attack: str) -> bytes:
    """Bars of accuracy under each exchange of experts, on clean images and on attacked ones."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        grid(axes)
        x = np.arange(len(exchange))
        for offset, kind, title, colour in (
            (-0.2, "clean", "clean images", BLUE),
            (0.2, "attacked", f"{attack} images", VERMILION),
        ):
            values = [100 * found[kind]["accuracy"] for found in exchange.values()]
            axes.bar(x + offset, values, 0.38, color=colour, label=title)
        names = [name.replace("_", " ") for name in exchange]
        axes.set_xticks(x, labels=names, rotation=45, ha="right", fontsize=9)
        axes.set(ylabel="accuracy (%)", ylim=(0, 101))
        axes.legend(loc="lower right", fontsize=9)

    return png_of(draw, (max(6.0, 0.45 * len(exchange) + 2), 4.2))
