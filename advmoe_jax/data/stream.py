"""Training images that stay with the host: batches are made while the device computes.

For data that does not fit on a device, or, still encoded, not even in the host's memory. The images
and their order are those of a run whose data lives on the device: same seed, same bits.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.data import pipeline
from advmoe_jax.data.sources import Split
from advmoe_jax.parallel import DATA_AXIS

AHEAD = 2  # batches that are made before they are needed


class Stream:
    """A training split on the host.

    Args:
        split: images uint8 [N, H, W, C], decoded or not, and labels int32 [N].
        mesh: the devices that share every batch.
        batch_size: of the global batch, a multiple of the number of devices.
        mixture: extra images, which stand at the end of the split.
    """

    def __init__(
        self, split: Split, mesh: Mesh, batch_size: int, mixture: pipeline.Mixture
    ) -> None:
        self._split, self._batch_size, self._mixture = split, batch_size, mixture
        self._sharding = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
        self._epoch_indices = jax.jit(self._indices_of_steps)

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]."""
        return self._split.labels

    def batch_shapes(self) -> pipeline.DeviceData:
        """Shapes and dtypes of a global batch."""
        images = (self._batch_size, *self._split.images.shape[1:])
        return pipeline.DeviceData(
            jax.ShapeDtypeStruct(images, jnp.uint8),
            jax.ShapeDtypeStruct(images[:1], jnp.int32),
        )

    def batches(
        self, order: jax.Array, key: jax.Array, first_step: int, start: int, stop: int
    ) -> Iterator[pipeline.DeviceData]:
        """The batches of an epoch, made ahead by a thread.

        Args:
            order: int32, the epoch's order.
            key: the run's key of steps, see ``loop.Task``.
            first_step: number of the epoch's first step in the run.
            start: the first batch of the epoch that is wanted.
            stop: the one behind the last.

        Yields:
            Global batches, a contiguous part on each device; every host makes its devices' parts.

        Raises:
            UserError: if an image cannot be decoded.
        """
        steps = jnp.arange(start, stop)
        indices = np.asarray(self._epoch_indices(order, key, first_step, steps))
        waiting = iter(indices)
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self._read, i) for i in islice(waiting, AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(thread.submit(self._read, i) for i in islice(waiting, 1))
                yield batch

    def _indices_of_steps(
        self, order: jax.Array, key: jax.Array, first_step: jax.Array, steps: jax.Array
    ) -> jax.Array:
        positions = jnp.arange(self._batch_size, dtype=jnp.int32)

        def of_step(step: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, first_step + step)
            return pipeline.batch_indices(
                order, step, self._batch_size, own, self._mixture, positions
            )

        return jax.vmap(of_step)(steps)

    def _read(self, indices: np.ndarray) -> pipeline.DeviceData:
        def part(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                (len(indices), *array.shape[1:]),
                self._sharding,
                lambda where: np.asarray(array[indices[where[0]]]),
            )

        return pipeline.DeviceData(*map(part, self._split))
