"""Times and memory, measured side by side in one process.

Absolute times of a shared machine mean little; ratios of times taken in turn hold.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Call = Callable[[], Any]
REPEATS, SECONDS = 7, 20.0


class Timing(NamedTuple):
    """Seconds of one call, one entry a round; the same round of two timings was taken in turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds of the call in the middle."""
        return statistics.median(self.seconds)


class Compiled(NamedTuple):
    """A compiled program bound to its arguments.

    Attributes:
        call: runs it; returns its outputs, perhaps before they are computed.
        compile_seconds: tracing and compiling.
        temporary_bytes: what it allocates beside arguments and outputs.
    """

    call: Call
    compile_seconds: float
    temporary_bytes: int

    @property
    def mebibytes(self) -> float:
        """``temporary_bytes`` in MiB."""
        return self.temporary_bytes / 2**20


def compiled(function: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles ``function(*args)`` for repeated calls on the same arguments."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    return Compiled(lambda: program(*args), seconds, temporary)


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


def matrix_product(dtype: jnp.dtype = jnp.float32) -> tuple[Call, int]:
    """A square matrix product large enough for the device's peak, and its MACs."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.dot)
    return lambda: product(a, a), size**3
