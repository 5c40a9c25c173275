"""What is needed next is made before it is needed: by a thread, or by processes of their own."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from advmoe_jax.errors import UserError

AHEAD = 2  # what is made before it is needed, and what each worker process holds ready

Made = TypeVar("Made")
_END = object()


class Source(Protocol[Made]):
    """What can be made in any order, in any process: the same bits each time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Made:
        """The element of that number."""
        ...


def ahead(items: Iterator[Made]) -> Iterator[Made]:
    """The same items, taken by a thread before they are asked for."""
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, _END) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def made(source: Source[Made], workers: int) -> Iterator[Made]:
    """All elements in order.

    Args:
        source: what makes them; has to be pickled for worker processes.
        workers: processes that make them, with grain; each holds no more than a few. 0: this one,
            when they are asked for.

    Raises:
        UserError: if grain is not installed, and whatever the source raises.
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
        .mp_prefetch(grain.MultiprocessingOptions(min(workers, len(source)), AHEAD))
    )
    items = iter(dataset)
    try:
        yield from items
    finally:
        items.close()


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
