"""One process of a run: its line to the hub, and its way to JAX's service through the hub.

JAX's client ends its process with a dump of the stack once the service's end of its connection is
closed. The way through the hub does not close: what has happened is learned here, and said in one
line.
"""

import os
import socket
import sys
import threading
import time
from contextlib import suppress

from advmoe_jax.errors import UserError
from advmoe_jax.hosts.hub import BEAT, GONE, LOST, SILENCE, Line, pump, silent
from advmoe_jax.hosts.stopping import Stopping

AGAIN = "give the same commands again: they go on from what was saved"


class Member:
    """A process that has come; it ends by itself, in one line, when another one is lost.

    Args:
        host: of the first process.
        port: where its hub listens.
        count: how many processes there are.
        index: which one this is.
        patience: seconds to wait for the hub.
        silence: seconds without a sign of life after which the first process counts as lost.

    Attributes:
        stopping: at which step all stop.

    Raises:
        TimeoutError: if nobody listens there.
        UserError: if the hub refuses this process.
    """

    def __init__(
        self,
        host: str,
        port: int,
        count: int,
        index: int,
        *,
        patience: float,
        silence: float = SILENCE,
    ) -> None:
        self._address, self._count, self._index = (host, port), count, index
        self._silence, self._started, self._done = silence, threading.Event(), threading.Event()
        self._is_failing, self._verdict = False, threading.Event()
        self._told, self.stopping = threading.Event(), Stopping()
        self._refused = ""
        connection = _connected(self._address, time.monotonic() + patience)
        connection.settimeout(silence)
        self._line = Line(connection)
        self._line.say("P", f"{index} {count} {socket.gethostname()}")
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def wait_for_all(self, patience: float) -> None:
        """Returns when every process has come.

        Raises:
            TimeoutError: if they have not within so many seconds.
            UserError: if the hub refuses this process.
        """
        if not self._started.wait(patience):
            raise TimeoutError
        if self._refused:
            host, port = self._address
            raise UserError(
                f"--coordinator={host}:{port} refuses process {self._index}: {self._refused}; "
                "give every process another --process_id, and all the same --num_processes"
            )

    def tunnel(self) -> int:
        """A port of this machine at which JAX's service answers."""
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, args=[server], daemon=True).start()
        return server.getsockname()[1]

    def wait_to_leave(self) -> None:
        """Returns when every process has called this."""
        self._line.say("through")
        self._done.wait()

    def leave(self) -> None:
        """Says goodbye."""
        self._line.say("bye")

    def stop(self) -> None:
        """Asks all to stop; may be called by a signal's handler, and returns at once."""
        self._told.set()

    def fail(self, why: str, code: int) -> None:
        """Tells the others why this process ends, with which exit code."""
        self._is_failing = True
        self._line.say("failed", f"{code} {why}")
        self._verdict.wait(2 * BEAT)  # until the hub has told them

    def _accept(self, server: socket.socket) -> None:
        while True:
            own = server.accept()[0]
            try:
                other = socket.create_connection(self._address)
                other.sendall(b"T")
            except OSError:  # the line's reader notices, too
                continue
            for pair in ((own, other), (other, own)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def _beat(self) -> None:
        while not self._told.wait(BEAT):
            self._line.say("beat")
        self._line.say("stop")
        while True:
            time.sleep(BEAT)
            self._line.say("beat")

    def _listen(self) -> None:
        host, port = self._address
        first = f"process 0 of {self._count} at {host}:{port}, where all meet,"
        try:
            for word, text in self._line.heard():
                if word == "lost":
                    code, _, what = text.partition(" ")
                    self._end(what, int(code))
                elif word == "refused":
                    self._refused = text
                    self._started.set()
                    return
                elif word == "start":
                    self._started.set()
                elif word == "done":
                    self._done.set()
                elif word == "steps":
                    self._line.say("steps", str(self.stopping.ask()))
                elif word == "stop":
                    self.stopping.settle(int(text))
            if not self._done.is_set():
                self._end(f"{first} {GONE}", LOST)
        except TimeoutError:
            self._end(f"{first} {silent(self._silence)}", LOST)

    def _end(self, what: str, code: int) -> None:
        self._verdict.set()
        if self._is_failing:
            return
        if self._index == 0:
            time.sleep(BEAT / 2)  # the hub lies in this process: let all hear of it
        print(f"error: {what}; {AGAIN}", file=sys.stderr, flush=True)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _connected(address: tuple[str, int], deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=BEAT)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError from error
            time.sleep(BEAT / 10)
