"""How the processes of one run find each other; a run of one process needs nothing of it."""

import errno
import os
import re
import socket
import sys
import threading

import jax

from advmoe_jax.errors import UserError

PATIENCE = 300.0  # seconds in which all processes must have come, JAX's own


def join(address: str, count: int | None, index: int | None, *, patience: float = PATIENCE) -> None:
    """Joins the other processes of a run, if there are others.

    Args:
        address: ``address:port`` of the first process; ``auto`` where the cluster says it; empty
            in a run of one process.
        count: how many processes there are.
        index: which one this is.
        patience: seconds to wait for all of them. A process that waits in vain says so in one line
            and ends with exit code 2: JAX would abort with a dump of its stack.

    Raises:
        UserError: if the three do not go together, or the port is taken.
    """
    if address == "auto":
        jax.distributed.initialize()
        return
    if not address:
        for name, value in (("num_processes", count), ("process_id", index)):
            if value is not None:
                raise UserError(
                    f"--{name}={value} is of a run of several processes: it needs "
                    "--coordinator=address:port too"
                )
        return
    _check(address, count, index)
    if index == 0:
        _check_port(address)
    others = "the others" if index == 0 else "the first one"
    if count > 1:
        print(f"process {index} of {count}: waiting for {others} at {address}", flush=True)
    alarm = threading.Timer(patience, _give_up, [address, count, patience])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=int(patience) + 60)
    finally:
        alarm.cancel()


def _check(address: str, count: int | None, index: int | None) -> None:
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if not port or not 0 < int(port[1]) < 2**16:
        raise UserError(f"--coordinator={address} must be address:port, or auto")
    if count is None or index is None:
        raise UserError(
            f"--coordinator={address} needs --num_processes and --process_id too; or give "
            "--coordinator=auto on TPU and SLURM"
        )
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must lie in 0 to {count - 1}, of {count} processes")


def _check_port(address: str) -> None:
    """Raises UserError if another program listens where this one has to."""
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            reason = "is taken" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
            raise UserError(
                f"--coordinator={address}: port {port} {reason}; choose another, or end what "
                "listens there"
            ) from None


def _give_up(address: str, count: int, patience: float) -> None:
    print(
        f"error: not all of {count} processes have come to {address} within {patience:.0f} s; "
        "start every one, with the same --coordinator and --num_processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
