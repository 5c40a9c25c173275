"""Training images that stay with the host: batches are made while the device computes.

For data that does not fit on a device, or, still encoded, not even in the host's memory. The images
and their order are those of a run whose data lives on the device: same seed, same bits.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, Key

from advmoe_jax.data.batch import (
    BatchRecipe,
    DeviceData,
    Feed,
    Indices,
    Pixels,
    Reader,
    batch_indices,
    take,
)
from advmoe_jax.data.sources import Split
from advmoe_jax.parallel import DATA_AXIS
from advmoe_jax.types import Array

AHEAD = 2  # batches that are made before they are needed


def _read_own(
    data: DeviceData, positions: Indices, indices: Indices, axis_name: str | None
) -> tuple[Pixels, Indices]:
    del positions, indices, axis_name
    return data.images, data.labels


def _read_others(
    data: DeviceData, positions: Indices, indices: Indices, axis_name: str | None
) -> tuple[Pixels, Indices]:
    del indices
    if axis_name is not None:  # the parts of all devices
        data = DeviceData(*(jax.lax.all_gather(part, axis_name, tiled=True) for part in data))
    return take(data, positions)


class Stream(Feed):
    """A training split on the host; a step reads its batch, each device a contiguous part of it.

    Args:
        split: images uint8 [N, H, W, C], decoded or not, and labels int32 [N].
        mesh: the devices that share every batch.
        recipe: how batches are made, of a size that the devices can share; its extra images stand
            at the end of the split.
    """

    reader = Reader(own=_read_own, others=_read_others)
    spec = PartitionSpec(DATA_AXIS)

    def __init__(self, split: Split, mesh: Mesh, recipe: BatchRecipe) -> None:
        self._split, self.recipe = split, recipe
        self._sharding = NamedSharding(mesh, self.spec)

    @property
    def size(self) -> int:
        """Number of images, extra ones included."""
        return len(self._split.labels)

    @property
    def shapes(self) -> DeviceData:
        """Shapes and dtypes of a global batch."""
        images = (self.recipe.batch_size, *self._split.images.shape[1:])
        return DeviceData(
            jax.ShapeDtypeStruct(images, jnp.uint8),
            jax.ShapeDtypeStruct(images[:1], jnp.int32),
        )

    def batches(
        self, order: Indices, key: Key[Array, ""], first_step: int, start: int, stop: int
    ) -> Iterator[DeviceData]:
        """The batches, made ahead by a thread; every host makes its devices' parts.

        Raises:
            UserError: if an image cannot be decoded.
        """
        steps = jnp.arange(start, stop)
        indices = np.asarray(_indices_of_steps(self.recipe, order, key, first_step, steps))
        waiting = iter(indices)
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self._read, i) for i in islice(waiting, AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(thread.submit(self._read, i) for i in islice(waiting, 1))
                yield batch

    def _read(self, indices: np.ndarray) -> DeviceData:
        def part(array: np.ndarray) -> Array:
            return jax.make_array_from_callback(
                (len(indices), *array.shape[1:]),
                self._sharding,
                lambda where: np.asarray(array[indices[where[0]]]),
            )

        return DeviceData(*map(part, self._split))


@partial(jax.jit, static_argnums=0)
def _indices_of_steps(
    recipe: BatchRecipe,
    order: Int[Array, " n"],
    key: Key[Array, ""],
    first_step: Int[Array, ""] | int,
    steps: Int[Array, " steps"],
) -> Int[Array, "steps batch"]:
    positions = jnp.arange(recipe.batch_size, dtype=jnp.int32)

    def of_step(step: Int[Array, ""]) -> Indices:
        own = jax.random.fold_in(key, first_step + step)
        return batch_indices(order, step, own, recipe, positions)

    return jax.vmap(of_step)(steps)
