"""What long work says where nobody watches a bar: in a log file, on a cluster."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

EVERY = 30.0  # seconds


@contextmanager
def heartbeat(
    console: Console, words: Callable[[], str], *, every: float = EVERY, enabled: bool = True
) -> Iterator[None]:
    """Prints a line from time to time until the context ends; nothing on a terminal.

    Args:
        console: where people read.
        words: what is to be said now; called from another thread.
        every: seconds between two lines, and before the first.
        enabled: False to say nothing.
    """
    if not enabled or console.is_terminal:
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
