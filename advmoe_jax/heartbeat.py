"""What long work says where nobody watches a bar: in a log file, on a cluster."""

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

EVERY = 30.0  # seconds


def shows_bars(console: Console) -> bool:
    """Whether a bar can move there: on a terminal, and in a notebook that has ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


@contextmanager
def heartbeat(
    console: Console, words: Callable[[], str], *, every: float = EVERY, enabled: bool = True
) -> Iterator[None]:
    """Prints a line from time to time until the context ends; nothing where bars are shown.

    Args:
        console: where people read.
        words: what is to be said now; called from another thread.
        every: seconds between two lines, and before the first.
        enabled: False to say nothing.
    """
    if not enabled or shows_bars(console):
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every):
            console.print(words(), highlight=False, soft_wrap=True, markup=False)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
