"""SIGTERM: how a cluster says that a run must stop, and how all hosts stop at the same step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come, the same answer on every host.

    Every host has to call it equally often.
    """
    if jax.process_count() > 1:
        # The runtime of jax.distributed catches the signal and agrees on a step to stop at.
        steps = iter(range(2**62))
        yield lambda: multihost_utils.reached_preemption_sync_point(next(steps))
        return
    came = []
    previous = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, previous)
