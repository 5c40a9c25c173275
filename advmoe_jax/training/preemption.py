"""SIGTERM and Ctrl-C: how a run is told to stop, and how all hosts stop at the same step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_requests() -> Iterator[Callable[[], signal.Signals | None]]:
    """Yields a function that says which signal to stop has come, if one has.

    It says the same on every host, and every host has to call it equally often. On one host, SIGINT
    (Ctrl-C) is such a signal too; a second one ends the process at once.
    """
    if jax.process_count() > 1:
        # The runtime of jax.distributed catches the signal and agrees on a step to stop at.
        steps = iter(range(2**62))
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda: signal.SIGTERM if reached(next(steps)) else None
        return
    came: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if came and number == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        came.append(signal.Signals(number))

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
