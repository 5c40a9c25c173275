"""The bar that a person watches while a run trains."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from advmoe_jax.heartbeat import heartbeat


@contextmanager
def progress_bar(
    console: Console, *, total: int, completed: int, batch_size: int, enabled: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function of a step's metrics, which shows loss, SA, images/s and the time left.

    Args:
        console: where people read; where it is no terminal, a line every half minute stands for
            the bar.
        total: steps of the whole run.
        completed: steps that are done.
        batch_size: images of a step.
        enabled: False to show nothing.
    """
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not (enabled and console.is_terminal),
    )

    def words() -> str:
        task = bar.tasks[0]
        return f"step {task.completed:.0f}/{total}  {task.fields['status']}"

    with bar, heartbeat(console, words, enabled=enabled):
        row: TaskID = bar.add_task("train", total=total, completed=completed, status="compiling")

        def advance(metrics: Mapping[str, Any]) -> None:
            speed = bar.tasks[0].speed
            status = f"loss {metrics['loss']:.3f}  SA {100 * metrics['standard_accuracy']:.1f}%"
            rate = f"  {speed * batch_size:.0f} images/s" if speed else ""
            bar.update(row, advance=1, status=status + rate)

        yield advance
