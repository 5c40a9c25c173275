"""What is needed next is made before it is needed: by a thread, or by processes of their own."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

from advmoe_jax.errors import UserError

AHEAD = 2  # what is made before it is needed, and what each worker process holds ready

Made = TypeVar("Made")
MadeBy = TypeVar("MadeBy", covariant=True)
_END = object()


class Source(Protocol[MadeBy]):
    """What can be made in any order, by any process: the same bits each time."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> MadeBy:
        """The element of that number."""
        ...


def ahead(items: Iterator[Made]) -> Generator[Made]:
    """The same items, taken by a thread before they are asked for."""
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, _END) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def made(source: Source[Made], workers: int) -> Generator[Made]:
    """All elements in order.

    Args:
        source: what makes them; it is pickled for worker processes.
        workers: processes that make them, of grain, each of which holds no more than a few. 0: this
            process makes them, when they are asked for.

    Raises:
        UserError: if grain is not installed, or a worker process ends; and what the source raises.
    """
    if not workers:
        yield from (source[i] for i in range(len(source)))
        return
    check_workers(workers)
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # in a notebook nobody has; grain reads flags of its own
        flags.FLAGS.mark_as_parsed()
    dataset = (
        grain.MapDataset.source(source)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        .mp_prefetch(
            grain.MultiprocessingOptions(min(workers, len(source)), AHEAD),
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
    )
    items = iter(dataset)
    try:
        yield from items
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        raise UserError(
            f"a worker process failed ({reason}): give the command again, with fewer data.workers"
            " if memory is short"
        ) from error
    finally:
        items.close()


def _begin_worker(parent: int, index: int, count: int) -> None:
    """What a worker process does first: signals are the parent's, and its end is theirs."""
    del index, count
    for number in (signal.SIGTERM, signal.SIGINT):  # a cluster sends them to all processes
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check_workers(workers: int) -> None:
    """Raises UserError if there are to be worker processes, and grain is not installed."""
    if workers:
        try:
            import grain  # noqa: F401
        except ImportError:
            raise UserError(
                f"data.workers={workers} needs grain, which is not installed: run `pip install "
                "'advmoe_jax[grain]'`, or set data.workers=0"
            ) from None
