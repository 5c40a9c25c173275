"""The step at which a process stops with the others."""

import threading

from advmoe_jax.hosts.stopping import Stopping


def test_a_process_stops_at_the_step_that_is_named_and_at_no_other():
    stopping = Stopping()
    assert not any(stopping.reached() for _ in range(3))
    assert stopping.ask() == 3
    stopping.settle(6)
    assert [stopping.reached() for _ in range(5)] == [False, False, True, False, False]


def test_once_asked_no_step_begins_before_it_is_settled():
    """Else this process could pass the step at which the others stop."""
    stopping, went_on = Stopping(), threading.Event()
    stopping.reached()
    assert stopping.ask() == 1
    found = []

    def step():
        found.append(stopping.reached())
        went_on.set()

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    assert not went_on.wait(0.2)
    stopping.settle(2)
    thread.join(60)
    assert found == [True]
