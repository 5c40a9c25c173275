"""Two processes never do the same work in one directory."""

import os
import signal
import subprocess
import sys

import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.runs.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from advmoe_jax.runs.lock import locked
with locked(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        told = f"training is under way there already, by process {first.pid} on "
        with pytest.raises(UserError, match=told), locked(tmp_path, "training"):
            pass
        with locked(tmp_path, "evaluation"):
            pass
        os.kill(first.pid, signal.SIGKILL)
    for _ in range(2):
        with locked(tmp_path, "training"):
            pass
