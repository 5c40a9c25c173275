"""How figures look, and the way from a figure to a PNG; shared by all reports."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

# Okabe and Ito's colours: told apart with any common colour blindness, and in grey.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, "#E69F00", "#56B4E9", "#B8A800", "#555555")

_SETTINGS = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names of classes are names
}


def png_of(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """The PNG of what ``draw`` draws on a figure of ``size``, width and height in inches."""
    # Imported here: it takes a second that only a report is worth. No pyplot: it keeps figures in
    # global state and may want a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    png = io.BytesIO()
    picture.save(png, format="png", optimize=True)  # no alpha channel
    return png.getvalue()


def grid(axes: Any) -> None:
    """Faint lines behind what is drawn."""
    axes.set_axisbelow(True)
    axes.grid(color="#dddddd", linewidth=0.8)


def legend_beside(axes: Any) -> None:
    """A legend to the right, where it hides nothing; none if nothing has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
