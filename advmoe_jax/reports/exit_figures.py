"""Figures of networks that images leave early: where they leave, what moving thresholds buys."""

from collections.abc import Mapping
from typing import Any

from advmoe_jax.reports.figures import COLOURS, grid, legend_beside, png_of
from advmoe_jax.reports.table import as_mapping

Tree = Mapping[str, Any]


def exit_figures(
    rows: Mapping[str, Tree], styles: Mapping[str, Tree], seed: str, columns: Tree
) -> dict[str, bytes]:
    """``exit_shares.png`` and ``exit_curves.png``; {} if no row has exits.

    Args:
        rows: of a comparison, by name.
        styles: of each row, settings of matplotlib's plot.
        seed: whose runs are shown.
        columns: of the comparison; they tell which attacks are shown.
    """
    prefix = "robust_accuracy."
    attacks = ["clean", *(x.removeprefix(prefix) for x in columns if x.startswith(prefix))]
    shown = {
        name: as_mapping(as_mapping(row["runs"].get(seed)).get("exits")).get("under")
        for name, row in rows.items()
    }
    shown = {name: under for name, under in shown.items() if under}
    if not shown:
        return {}
    attacks = [attack for attack in attacks if any(attack in under for under in shown.values())]
    titles = {name: rows[name]["title"] for name in shown}
    return {
        "exit_shares.png": _shares(shown, titles, attacks),
        "exit_curves.png": _curves(shown, titles, attacks, rows, styles, seed),
    }


def _shares(shown: Mapping[str, Tree], titles: Mapping[str, str], attacks: list[str]) -> bytes:
    """A bar for each attack, cut into the shares of the exits; one panel a row."""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
        for axes, (name, under) in zip(all_axes, shown.items(), strict=True):
            grid(axes)
            names = [attack for attack in attacks if attack in under]
            left = [0.0] * len(names)
            for exit_number in range(len(under[names[0]]["share"])):
                share = [100 * under[attack]["share"][exit_number] for attack in names]
                last = exit_number == len(under[names[0]]["share"]) - 1
                axes.barh(
                    names,
                    share,
                    left=left,
                    color=COLOURS[exit_number % len(COLOURS)],
                    label="main" if last else f"exit {exit_number + 1}",
                )
                left = [a + b for a, b in zip(left, share, strict=True)]
            axes.invert_yaxis()
            axes.set_title(titles[name], fontsize=10, loc="left")
        all_axes[-1].set_xlabel("share of the images (%)")
        legend_beside(all_axes[0])

    return png_of(draw, (9.0, 0.8 + len(shown) * (0.6 + 0.28 * len(attacks))))


def _curves(
    shown: Mapping[str, Tree],
    titles: Mapping[str, str],
    attacks: list[str],
    rows: Mapping[str, Tree],
    styles: Mapping[str, Tree],
    seed: str,
) -> bytes:
    """Accuracy over mean MACs, one panel for each attack; rows without exits are points."""

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(len(attacks), sharex=True, squeeze=False)[:, 0]
        for axes, attack in zip(all_axes, attacks, strict=True):
            grid(axes)
            for name, row in rows.items():
                style, run = styles[name], row["runs"].get(seed)
                if name in shown and attack in shown[name] and shown[name][attack]["curve"]:
                    macs, accuracy = zip(*shown[name][attack]["curve"], strict=True)
                    line = {**style, "marker": None}
                    at = [x / 1e6 for x in macs], [100 * x for x in accuracy]
                    axes.plot(*at, label=titles[name], **line)
                if run is None:
                    continue
                measured = "standard_accuracy" if attack == "clean" else f"robust_accuracy.{attack}"
                if run.get(measured) is not None and f"mean_macs.{attack}" in run:
                    axes.plot(
                        run[f"mean_macs.{attack}"],
                        100 * run[measured],
                        label=None if name in shown else row["title"],
                        **{**style, "linestyle": "none", "markersize": 8},
                    )
            axes.set_ylabel(f"accuracy (%)\n{attack}")
        all_axes[-1].set_xlabel("mean multiply-accumulates per image (millions)")
        legend_beside(all_axes[0])

    return png_of(draw, (9.0, 0.8 + 2.4 * len(attacks)))
