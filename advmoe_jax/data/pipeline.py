"""Images that live on the device: the whole set is copied once, each batch is taken inside jit.

A data set of this kind fits in a chip's memory (CIFAR-10 is 180 MB as uint8), so a step reads,
augments and converts its own batch there, and no host stands between two steps.
"""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import repeat

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Key

from advmoe_jax.data.batch import BatchRecipe, DeviceData, Feed, Indices, Pixels, Reader, take
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Streamed
from advmoe_jax.parallel import batch_spec, parallel
from advmoe_jax.types import Array, Axes


def _read(
    data: DeviceData, positions: Indices, indices: Indices, axis_name: Axes | None
) -> tuple[Pixels, Indices]:
    del positions, axis_name
    return take(data, indices)


class Resident(Feed):
    """A training split that every device holds whole.

    Args:
        split: images uint8 [N, H, W, C] and labels int32 [N].
        mesh: the devices.
        recipe: how batches are made; its extra images stand at the end of the split.
    """

    reader = Reader(own=_read, others=_read)
    spec = PartitionSpec()

    def __init__(self, split: Split, mesh: Mesh, recipe: BatchRecipe) -> None:
        self.data, self.recipe = resident(split, mesh), recipe

    @property
    def size(self) -> int:
        """Number of images, extra ones included."""
        return len(self.data.labels)

    @property
    def shapes(self) -> DeviceData:
        """Shapes and dtypes of the split, which every step reads whole."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.data)

    def batches(
        self, order_key: Key[Array, ""], step_key: Key[Array, ""], start: int, stop: int
    ) -> Generator[DeviceData]:
        """The split, once for each step."""
        del order_key, step_key
        yield from repeat(self.data, stop - start)


def put(split: Split, mesh: Mesh | None = None) -> DeviceData | Streamed:
    """A split as evaluations take it: on every device of the mesh, or on the default device.

    With several processes each gives its own copy of the same split, and its own devices are filled
    from it: nothing travels between hosts. Images that are not decoded stay with the host, unless
    there is no mesh: their batches are made when they are needed.
    """
    if mesh is None:
        return DeviceData(*(jax.device_put(np.asarray(array)) for array in split))
    if isinstance(split.images, EncodedImages):
        return Streamed(split, mesh)
    return resident(split, mesh)


def resident(split: Split, mesh: Mesh) -> DeviceData:
    """A split on every device of the mesh, decoded; see ``put``."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return DeviceData(
        *(
            jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)
            for array in map(np.asarray, split)
        )
    )


def batches_at(
    data: DeviceData | Streamed, mesh: Mesh, indices: Sequence[np.ndarray]
) -> Iterator[DeviceData]:
    """The images at these indices, batch by batch, each spread over the devices of the mesh.

    Args:
        data: what ``put`` gave.
        mesh: the devices.
        indices: int32 [n] of each batch; n is the same for all, a multiple of the devices.
    """
    if isinstance(data, Streamed):
        return data.batches(indices)
    return (_spread(data, at, mesh) for at in indices)


@partial(jax.jit, static_argnums=2)
def _spread(data: DeviceData, indices: Indices, mesh: Mesh) -> DeviceData:
    spread = batch_spec(mesh)
    taken = parallel(take, mesh, in_specs=(PartitionSpec(), spread), out_specs=spread)
    return DeviceData(*taken(data, indices))


def evaluation_batches(num_images: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Every image once, in order, in batches of one static shape.

    Yields:
        Indices int32 [batch_size], and how many of them count: the last batch is filled up by
        repeating the last index.
    """
    for start in range(0, num_images, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(indices, num_images - 1), min(batch_size, num_images - start)
