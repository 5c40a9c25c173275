"""Where the processes of a run meet, and learn what has become of the others.

The first process listens at the run's address. Every process, the first one too, opens a line to
it and says every second that it lives; whoever is silent for too long, or whose line breaks, is
lost, and the hub tells the rest. JAX's own service, which ends a process with a dump of its stack,
lies behind the hub: what comes over a ``tunnel`` is handed on to it.

A line carries lines of text: a word, and what belongs to it.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

BEAT = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds after which a process counts as lost
LOST = 75  # exit code of a process that has lost another one: try again (EX_TEMPFAIL)
_LONGEST = 4096  # bytes of a line


class Line:
    """A connection that carries lines of text, for one who reads and any number who write."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self._writing = connection, threading.Lock()

    def say(self, word: str, text: str = "") -> None:
        """Sends a line; a broken connection is the reader's to notice."""
        line = f"{word} {' '.join(text.split())}".encode()[: _LONGEST - 1] + b"\n"
        with self._writing, suppress(OSError):
            self.connection.sendall(line)

    def heard(self) -> Iterator[tuple[str, str]]:
        """Yields word and text of every line until the connection ends.

        Raises:
            TimeoutError: if the connection has a timeout, and nothing came.
        """
        rest = b""
        while True:
            try:
                some = self.connection.recv(_LONGEST)
            except TimeoutError:
                raise
            except OSError:
                return
            *lines, rest = (rest + some).split(b"\n")
            for line in lines:
                word, _, text = line.decode(errors="replace").partition(" ")
                yield word, text
            if not some or len(rest) > _LONGEST:
                return


class Hub:
    """The first process's side.

    Args:
        port: where to listen.
        count: how many processes there are.
        service: port of JAX's service, on this machine.
        silence: seconds after which a process counts as lost.
    """

    def __init__(self, port: int, count: int, service: int, silence: float = SILENCE) -> None:
        self._count, self._service, self._silence = count, service, silence
        self._lines: dict[int, Line] = {}
        self._hosts: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._through: set[int] = set()
        self._is_stopping = False
        self._steps: dict[int, int] = {}  # of each process, once one is told to stop
        self._lock, self._is_over = threading.RLock(), False
        self._all_left = threading.Event()
        # Both families, where the machine has them.
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=both, backlog=max(count * 2, 128)
        )
        for work in (self._accept, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def close(self, patience: float = SILENCE) -> None:
        """Returns when every process has left, or after so many seconds."""
        self._all_left.wait(patience)
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._server.accept()[0]
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # The first byte says which of the two it is: a tunnel's next bytes are JAX's.
        with connection:
            try:
                kind = connection.recv(1)
            except OSError:
                return
            if kind == b"T":
                serve_tunnel(connection, self._service)
            elif kind == b"P":
                self._listen(Line(connection))

    def _listen(self, line: Line) -> None:
        heard = line.heard()
        index = self._admit(line, next(heard, ("", ""))[1])
        if index is None:
            return
        for word, text in heard:
            self._heard[index] = time.monotonic()
            if word == "through":
                self._note_through(index)
            elif word == "stop":
                self._stop()
            elif word == "steps":
                self._note_steps(index, int(text))
            elif word == "failed":
                code, _, what = text.partition(" ")
                self._give_up(index, f"has ended: {what}", code)
            elif word == "bye":
                break
        self._leave(index)

    def _admit(self, line: Line, text: str) -> int | None:
        """The number of a process that introduces itself, None if it is refused."""
        try:
            index, count, host = text.split(" ", 2)
            index, count = int(index), int(count)
        except ValueError:  # a stranger
            return None
        with self._lock:
            if count != self._count:
                line.say("refused", f"the first process is one of {self._count}, this of {count}")
                return None
            if index in self._lines or not 0 <= index < count:
                line.say("refused", f"there is a process {index} already")
                return None
            self._lines[index], self._hosts[index] = line, host
            self._heard[index] = time.monotonic()
            if len(self._lines) == self._count:
                self._tell("start")
        return index

    def _beat(self) -> None:
        while not self._all_left.wait(BEAT):
            self._tell("beat")
            now = time.monotonic()
            if len(self._lines) < self._count:
                continue
            for index, heard in list(self._heard.items()):
                if now - heard > self._silence:
                    self._give_up(index, silent(self._silence))

    def _note_through(self, index: int) -> None:
        with self._lock:
            self._through.add(index)
            if len(self._through) == self._count:
                self._is_over = True
                self._tell("done")

    def _stop(self) -> None:
        with self._lock:
            if not self._is_stopping:
                self._is_stopping = True
                self._tell("steps")

    def _note_steps(self, index: int, steps: int) -> None:
        with self._lock:
            self._steps[index] = steps
            if len(self._steps) == self._count:
                self._tell("stop", str(max(self._steps.values()) + 1))

    def _leave(self, index: int) -> None:
        with self._lock:
            if not self._is_over:
                self._give_up(index, GONE)
            self._lines.pop(index, None)
            if not self._lines:
                self._all_left.set()

    def _give_up(self, index: int, why: str, code: str = str(LOST)) -> None:
        """Tells all that a process is lost, the first time that one is."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            where = f"process {index} of {self._count} on {self._hosts[index]}"
            # This machine's own process ends with it: last.
            for other in sorted(self._lines, reverse=True):
                self._lines[other].say("lost", f"{code} {where} {why}")

    def _tell(self, word: str, text: str = "") -> None:
        with self._lock:
            for line in self._lines.values():
                line.say(word, text)


GONE = "is gone: it was killed, or its machine has failed"


def silent(seconds: float) -> str:
    """What is said of a process that does not answer."""
    return f"has not answered for {seconds:.0f} s: it hangs, or its machine cannot be reached"


def serve_tunnel(connection: socket.socket, port: int) -> None:
    """Hands on what comes, and what is answered, until one side closes."""
    try:
        other = socket.create_connection(("127.0.0.1", port))
    except OSError:
        return
    with other:
        back = threading.Thread(target=pump, args=[other, connection], daemon=True)
        back.start()
        pump(connection, other)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
        back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Hands on all bytes until a side closes."""
    with suppress(OSError):
        while some := source.recv(2**16):
            target.sendall(some)
