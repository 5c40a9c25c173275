"""A progress bar for evaluations that take hours, with the time left."""

from contextlib import ExitStack

from rich import get_console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from advmoe_jax.heartbeat import heartbeat, shows_bars


class Bar:
    """A context in which one bar is shown, from the first time it is told anything.

    Where there is no terminal, a line every half minute stands for it.

    Args:
        visible: whether it is shown at all.
    """

    def __init__(self, visible: bool) -> None:
        self._task, self._visible, self._words = None, visible, "compiling"
        self._running = ExitStack()
        console = get_console()
        # A notebook without widgets would be told at every call to install them.
        cannot = console.is_jupyter and not shows_bars(console)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not visible or cannot,
        )

    def __enter__(self) -> "Bar":
        self._running.enter_context(self._progress)
        console = self._progress.console
        self._running.enter_context(heartbeat(console, lambda: self._words, enabled=self._visible))
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def show(self, words: str, done: float, left: float) -> None:
        """What is done and what is left, in the same unit, whichever it is."""
        share = done / (done + left) if done + left else 1
        self._words = f"{words}: {100 * share:.0f}% done"
        if self._task is None:  # what a former run has done says nothing of this one's speed
            self._task = self._progress.add_task(words, completed=done, total=done + left)
        self._progress.update(self._task, description=words, completed=done, total=done + left)
