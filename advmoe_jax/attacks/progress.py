"""A progress bar for evaluations that take hours, with the time left."""

from contextlib import nullcontext
from typing import Any


def progress_bar(progress: bool) -> Any:
    """A context: a ``rich`` bar with one task, ``bar.task``; None if there shall be none."""
    if not progress:
        return nullcontext()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    class Bar(Progress):
        """A bar of the whole evaluation."""

        work, ended, number = 0.0, 0.0, -1

    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(elapsed_when_finished=False),
    )
    bar.task = bar.add_task("attacks", total=None)
    return bar
