"""How the processes of one run find each other, and end when one of them is lost.

A run of one process needs nothing of it.
"""

import errno
import os
import signal
import socket
import sys
import time
from typing import NamedTuple

import jax

from advmoe_jax.errors import UserError
from advmoe_jax.hosts.address import Place, located
from advmoe_jax.hosts.hub import SILENCE, Hub
from advmoe_jax.hosts.member import Member

__all__ = ["await_verdict", "fail", "is_joined", "join", "leave", "reached_stop"]

PATIENCE = 300.0  # seconds in which all processes must have come, JAX's own
_NEVER = 10**6  # seconds: JAX's service judges nobody, the hub does


class _Joined(NamedTuple):
    """This process among others; the hub is the first one's."""

    member: Member
    hub: Hub | None


_joined: _Joined | None = None


def join(address: str, count: int | None, index: int | None, *, patience: float = PATIENCE) -> None:
    """Joins the other processes of a run, if there are others.

    From then on SIGTERM asks all of them to stop (``reached_stop``), and this process ends in one
    line with exit code 75 when another one is lost: at once where that one was killed, after
    ``hub.SILENCE`` seconds where it does not answer.

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
    global _joined
    place = located(address, count, index)
    if place is None:
        return
    hub, service = None, _free_port() if place.index == 0 else 0
    if place.index == 0:
        hub = _opened(place, service)
    if place.count > 1:
        others = "the others" if place.index == 0 else "the first one"
        print(
            f"process {place.index} of {place.count}: waiting for {others} at {place}", flush=True
        )
    deadline = time.monotonic() + patience
    host = "localhost" if hub else place.host
    try:
        member = Member(host, place.port, place.count, place.index, patience=patience)
        member.wait_for_all(deadline - time.monotonic())
    except TimeoutError:
        _give_up(place, patience)
    signal.signal(signal.SIGTERM, lambda number, frame: member.stop())
    jax.config.update("jax_enable_preemption_service", False)  # see ``stopping``
    jax.distributed.initialize(
        f"127.0.0.1:{service or member.tunnel()}",
        place.count,
        place.index,
        # Else a process would take one of its GPUs alone under SLURM.
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"127.0.0.1:{service}" if hub else None,
        heartbeat_timeout_seconds=_NEVER,
        shutdown_timeout_seconds=10,  # all are there when it begins
    )
    _joined = _Joined(member, hub)


def leave() -> None:
    """Ends what ``join`` began, once all processes are here; nothing in a run of one process."""
    global _joined
    if _joined is None:
        return
    _joined.member.wait_to_leave()
    jax.distributed.shutdown()
    _joined.member.leave()
    if _joined.hub is not None:
        _joined.hub.close()
    _joined = None


def is_joined() -> bool:
    """Whether this process is one of several."""
    return _joined is not None


def reached_stop() -> bool:
    """Whether all processes stop now, since one of them was told to by SIGTERM.

    All of them have to call this equally often, once a step, after ``join``.
    """
    return _joined.member.stopping.reached()


def fail(why: str, code: int) -> None:
    """Tells the other processes, if there are any, why this one ends, and with which exit code."""
    if _joined is not None:
        _joined.member.fail(why, code)


def await_verdict() -> None:
    """Waits until it would be known that another process is lost; does not return if one is.

    What fails in this process may be no more than a consequence: its partner in a sum is gone.
    """
    if _joined is not None:
        time.sleep(SILENCE + 5)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _opened(place: Place, service: int) -> Hub:
    try:
        return Hub(place.port, place.count, service)
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise UserError(
            f"--coordinator={place}: port {place.port} {reason}; choose another, or end what "
            "listens there"
        ) from None


def _give_up(place: Place, patience: float) -> None:
    print(
        f"error: not all of {place.count} processes have come to {place} within {patience:.0f} s; "
        "start every one, with the same --coordinator and --num_processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)
