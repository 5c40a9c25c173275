"""Locks on a run's directory: two processes never write the same files of it at once."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from advmoe_jax.errors import UserError
from advmoe_jax.storage import is_remote


@contextmanager
def locked(workdir: Path, work: str) -> Iterator[None]:
    """Keeps other processes from the same work until the context ends, or this process does.

    Of a run on several hosts, the first process holds the lock for all. A file system without locks
    keeps nobody from anything, and a bucket has none: a note there would outlive the process that
    was killed, and keep its own restart out.

    Args:
        workdir: the directory that the work writes to.
        work: what is done there, such as ``training``; other work may go on beside it.

    Raises:
        UserError: if another process is at it.
    """
    if jax.process_index() != 0 or is_remote(workdir):
        yield
        return
    with (workdir / f".{work}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir}: {work} is under way there already, by {file.read().strip()}; wait for "
                "its end, or use another --workdir"
            ) from None
        except OSError:  # no locks here
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
