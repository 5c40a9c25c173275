"""Compiled programs to be timed: what it took to compile them, and their memory."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advmoe_jax.evaluation.timing import Call


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


def matrix_product(dtype: jnp.dtype = jnp.float32) -> tuple[Call, int]:
    """A square matrix product large enough for the device's peak, and its MACs."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.dot)
    return lambda: product(a, a), size**3
