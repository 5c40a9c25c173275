"""What a study found, beside the bars that it must clear."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

MISSED = 1


class Bar(NamedTuple):
    """One figure of a study.

    Attributes:
        about: what was measured, in words and with its unit.
        value: the measurement.
        bound: what ``value`` must not exceed.
        at_least: whether ``value`` must not fall below ``bound`` instead.
    """

    about: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bar is cleared; a value that is no number clears none."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def conclude(title: str, bars: Sequence[Bar]) -> None:
    """Prints the figures.

    Raises:
        SystemExit: with code 1 if a bar is missed.
    """
    table = Table("figure", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("value", "bar"):
        table.add_column(name, justify="right")
    table.add_column("holds")
    for bar in bars:
        bound = f"{'≥' if bar.at_least else '≤'} {bar.bound:.3g}"
        table.add_row(bar.about, f"{bar.value:.3g}", bound, "yes" if bar.holds else "no")
    console = Console()
    console.print(table, highlight=False)
    if not all(bar.holds for bar in bars):
        raise SystemExit(MISSED)
