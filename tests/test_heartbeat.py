"""A line from time to time where there is no terminal, and nothing after the work has ended."""

import io
import threading

import pytest
from rich.console import Console

from advmoe_jax.heartbeat import heartbeat


@pytest.mark.parametrize("terminal, enabled", [(False, True), (True, True), (False, False)])
def test_lines_off_a_terminal_alone(terminal, enabled):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    said = threading.Event()
    counts = iter(range(1000))

    def words():
        count = next(counts)
        if count == 2:
            said.set()
        return f"[bold]{count} of 10"

    with heartbeat(console, words, every=0.001, enabled=enabled):
        if enabled and not terminal:
            assert said.wait(60)
    lines = console.file.getvalue().splitlines()
    if terminal or not enabled:
        assert lines == []
    else:
        assert lines[:3] == ["[bold]0 of 10", "[bold]1 of 10", "[bold]2 of 10"]
        assert len(lines) == next(counts)  # none came after the end


def test_an_error_ends_it():
    console, before = Console(file=io.StringIO()), threading.active_count()
    with pytest.raises(ZeroDivisionError), heartbeat(console, lambda: "at it", every=60):
        raise ZeroDivisionError
    assert threading.active_count() == before
    assert console.file.getvalue() == ""
