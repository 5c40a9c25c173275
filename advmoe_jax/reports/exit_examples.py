"""Which images leave early: examples for every exit, from the surest to the least sure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.reports.figures import VERMILION, png_of

FILE = "exit_examples.png"
CAPTION = (
    "Images by the exit at which they leave, clean: in each row from the least to the most "
    "uncertain of them, in equal steps. Above each: what it is seen as, in red if that is wrong; "
    "an arrow says at which other exit it leaves under the attack that is named at the bottom."
)
_SHOWN = 10  # images of each exit


def examples_by_exit(
    clean: Outcome,
    images: np.ndarray,
    class_names: Sequence[str],
    attacked: Mapping[str, Outcome],
) -> bytes:
    """A row of images for every exit.

    Args:
        clean: the dynamic network's answers to the images.
        images: uint8 [n, H, W, C].
        class_names: of the predictions.
        attacked: answers under attacks, by name; the first one's exits are told. May be empty.
    """
    exits, entropies = np.asarray(clean.exits), np.asarray(clean.entropies)
    count = entropies.shape[1] + 1
    attack = next(iter(attacked), None)
    moved = None if attack is None else np.asarray(attacked[attack].exits)

    def draw(figure: Any) -> None:
        all_axes = figure.subplots(count, _SHOWN, squeeze=False)
        for number, row in enumerate(all_axes):
            here = np.flatnonzero(exits == number)
            # The main exit asks for no certainty: its images are sorted by the last side exit's.
            order = here[np.argsort(entropies[here, min(number, count - 2)], kind="stable")]
            chosen = order[_evenly(len(order))]
            for axes in row:
                axes.axis("off")
            for axes, image in zip(row, chosen, strict=False):
                shown = images[image]
                axes.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray")
                text = class_names[clean.predictions[image]]
                if moved is not None and moved[image] != number:
                    text += f" → {_name(moved[image], count)}"
                right = clean.correct[image]
                axes.set_title(
                    text, fontsize=8, loc="center", color="black" if right else VERMILION
                )
            row[0].text(
                *(-0.25, 0.5, _told(number, count, here, clean.correct)),
                **{"transform": row[0].transAxes, "ha": "right", "va": "center", "fontsize": 9},
            )
        if attack is not None:
            figure.supxlabel(f"→: where it leaves under {attack}", fontsize=9)

    return png_of(draw, (11.0, 0.4 + 1.1 * count))


def _told(number: int, count: int, here: np.ndarray, correct: np.ndarray) -> str:
    right = f"\n{100 * correct[here].mean():.1f}% right" if len(here) else ""
    return f"{_name(number, count)}\n{len(here)} of {len(correct)}{right}"


def _name(number: int, count: int) -> str:
    return "main" if number == count - 1 else f"exit {number + 1}"


def _evenly(count: int) -> np.ndarray:
    """Up to ``_SHOWN`` places of a list, in equal steps from its beginning to its end."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(_SHOWN, count)).round().astype(int))
