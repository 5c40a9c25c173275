"""What a process of several says when the others do not come, or their meeting place is taken."""

import socket
import subprocess
import sys

import pytest

from advmoe_jax import hosts
from advmoe_jax.errors import UserError

LONELY = """
import sys
from advmoe_jax import hosts
hosts.join(sys.argv[1], 2, int(sys.argv[2]), patience=1.0)
"""


@pytest.fixture
def port():
    """Of nobody, a moment ago."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {taken} is taken; choose another"):
            hosts.join(f"localhost:{taken}", 2, 0)


@pytest.mark.parametrize("index", [0, 1])
def test_one_of_two_that_waits_in_vain(port, index):
    address = f"localhost:{port}"
    done = subprocess.run(
        [sys.executable, "-c", LONELY, address, str(index)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.startswith(f"process {index} of 2: waiting for the ")
    assert done.stderr == (
        f"error: not all of 2 processes have come to {address} within 1 s; start every one, with "
        "the same --coordinator and --num_processes\n"
    )


@pytest.mark.parametrize("address", ["localhost:0", "localhost:99999", "localhost", ":1x"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="must be address:port, or auto"):
        hosts.join(address, 2, 0)
