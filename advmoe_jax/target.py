"""The platform that programs are traced for: where they run, unless somebody says otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_named: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: what a choice between equal programs may depend on."""
    return _named.get() or jax.default_backend()


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """What is traced inside is meant for another platform than the one it is traced on.

    For asking another platform's compiler. What ``jit`` has traced before, it does not trace again:
    a function is traced for one platform in a process.
    """
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)
