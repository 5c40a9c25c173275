"""SIGTERM and Ctrl-C: how a run is told to stop, and how all hosts stop at the same step."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from itertools import count
from types import FrameType

import jax
from jax.experimental import multihost_utils

from advmoe_jax import hosts

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT})
_calls = count()  # the runtime's steps, of all contexts: it forgets none


@contextmanager
def stop_requests(
    signals: Set[signal.Signals] = _SIGNALS,
) -> Iterator[Callable[[], signal.Signals | None]]:
    """Yields a function that says which signal to stop has come, if one has.

    It says the same on every host, and every host has to call it equally often. On one host, SIGINT
    (Ctrl-C) is such a signal too; a second one ends the process at once.

    Args:
        signals: those that ask to stop; others do what they did before. In a thread of its own,
            which cannot hear of signals, nobody asks.
    """
    if jax.process_count() > 1 and hosts.is_joined():
        yield lambda: signal.SIGTERM if hosts.reached_stop() else None
        return
    if jax.process_count() > 1:
        # Whoever joined them has JAX's runtime, which catches the signal and agrees on a step, too.
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda: signal.SIGTERM if reached(next(_calls)) else None
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if came and number == signal.SIGINT:
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        came.append(signal.Signals(number))

    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield lambda: came[0] if came else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
