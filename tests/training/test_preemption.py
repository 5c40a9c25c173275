"""What a signal to stop does."""

import subprocess
import sys

TWICE = """
import os, signal
from advmoe_jax.training.preemption import stop_requests
with stop_requests() as stop_requested:
    assert stop_requested() is None
    os.kill(os.getpid(), signal.SIGINT)
    assert stop_requested() == signal.SIGINT
    print("once", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("twice", flush=True)
"""


def test_a_second_ctrl_c_ends_at_once():
    found = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (130, "once\n", "interrupted\n")
