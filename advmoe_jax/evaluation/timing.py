"""Times of calls, measured side by side in one process.

Absolute times of a shared machine mean little; ratios of times taken in turn hold.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Call = Callable[[], Any]
REPEATS, SECONDS = 7, 20.0


class Timing(NamedTuple):
    """Seconds of one call, one entry a round; the same round of two timings was taken in turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the call in the middle."""
        return statistics.median(self.seconds)


def alternate(
    calls: Mapping[str, Call], repeats: int = REPEATS, seconds: float = SECONDS
) -> dict[str, Timing]:
    """Times calls in turn: A B A B ...

    Args:
        calls: by name; each is run once before the clock starts, and synchronised after every run.
        repeats: rounds; odd, so that the median is one of them.
        seconds: after so many, no further round is begun, but three are run at least.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for i in range(repeats):
        if i >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - before)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def ratio(top: Timing, bottom: Timing) -> float:
    """Median over the rounds of the ratio within a round, which cancels a machine's drift."""
    return statistics.median(a / b for a, b in zip(top.seconds, bottom.seconds, strict=True))
