"""All processes stop at the same step, once one of them is told to.

Every process counts its steps. When one is told to stop, the hub asks all how far they are; from
its answer on a process waits before its next step, and when all have answered the hub names the
step after the furthest one's. (JAX has the same in C++, but waits with Python's lock in hand, and
with it all threads of the process: those that carry the answers, too.)
"""

import threading


class Stopping:
    """One process's part in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count, self._is_asked = 0, False
        self._last: int | None = None

    def reached(self) -> bool:
        """Counts a step; whether it is the one at which all stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._last is not None or not self._is_asked)
            self._count += 1
            return self._count == self._last

    def ask(self) -> int:
        """How many steps there have been; no further one begins before ``settle``."""
        with self._changed:
            self._is_asked = True
            return self._count

    def settle(self, last: int) -> None:
        """The number of the step at which all stop."""
        with self._changed:
            self._last = last
            self._changed.notify_all()
