"""A progress bar for evaluations that take hours, with the time left."""

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A context in which one bar is shown, from the first time it is told anything.

    Args:
        visible: whether it is shown at all.
    """

    def __init__(self, visible: bool) -> None:
        self._task = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            disable=not visible,
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, words: str, done: float, left: float) -> None:
        """What is done and what is left, in the same unit, whichever it is."""
        if self._task is None:  # what a former run has done says nothing of this one's speed
            self._task = self._progress.add_task(words, completed=done, total=done + left)
        self._progress.update(self._task, description=words, completed=done, total=done + left)
