"""What a benchmark found: figures with their bars, as tables and as JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text


class Figure(NamedTuple):
    """One row.

    Attributes:
        suite: that it belongs to.
        figure: what was measured, in words.
        value: the measurement.
        bar: what ``value`` must reach; None if it is there for reading only.
        unit: of value and bar; ``ratio`` of two times unless it says otherwise.
        at_least: whether ``value`` must not be below the bar, instead of not above it.
        macs: multiply-accumulates, as the same ratio.
        peak: share of a matrix product's speed that the numerator reaches.
        memory: MiB that the numerator allocates beside its arguments and outputs.
    """

    suite: str
    figure: str
    value: float
    bar: float | None = None
    unit: str = "ratio"
    at_least: bool = False
    macs: float | None = None
    peak: float | None = None
    memory: float | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def table(suite: str, figures: Iterable[Figure]) -> Table:
    """The figures of one suite, for printing."""
    shown = Table(title=suite, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("figure", overflow="fold")
    for name in ("value", "bar", "ok", "unit", "MACs", "of peak", "MiB"):
        shown.add_column(name, justify="left" if name in ("ok", "unit") else "right")
    for row in figures:
        comparison = ">=" if row.at_least else "<="
        bar = "" if row.bar is None else f"{comparison} {row.bar:g}"
        ok = {None: "", True: "yes", False: "no"}[row.ok]
        details = (_number(row.macs), _number(row.peak), _number(row.memory))
        cells = (row.figure, _number(row.value), bar, ok, row.unit, *details)
        shown.add_row(*(Text(cell) for cell in cells))
    return shown


def records(figures: Iterable[Figure]) -> Iterator[dict[str, Any]]:
    """One object a number: ``suite``, ``figure``, ``value``, ``bar``, ``ok``, ``unit``."""
    for row in figures:
        yield _record(row.suite, row.figure, row.value, row.bar, row.ok, row.unit)
        for name, value, unit in (
            ("MACs", row.macs, "ratio"),
            ("share of the matrix-product peak", row.peak, "ratio"),
            ("memory", row.memory, "MiB"),
        ):
            if value is not None:
                yield _record(row.suite, f"{row.figure}: {name}", value, None, None, unit)


def write_json(path: Path, machine: Mapping[str, Any], figures: Iterable[Figure]) -> None:
    """A list: the machine and versions in front, then ``records``."""
    path.write_text(json.dumps([dict(machine), *records(figures)], indent=1) + "\n")


def _record(
    suite: str, figure: str, value: float, bar: float | None, ok: bool | None, unit: str
) -> dict[str, Any]:
    return {"suite": suite, "figure": figure, "value": value, "bar": bar, "ok": ok, "unit": unit}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
