"""Images that stay with the host: batches are made while the device computes.

For data that do not fit on a device, or, still encoded, not even in the host's memory. The images
and their order are those of a run whose data lives on the device: same seed, same bits, however
many processes and workers make them.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, Int, Key

from advmoe_jax.data.ahead import ahead, check_workers, made
from advmoe_jax.data.batch import (
    BatchRecipe,
    DeviceData,
    Feed,
    Indices,
    Pixels,
    Reader,
    batch_indices,
    epoch_order,
    take,
)
from advmoe_jax.data.decoding import Crops
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.sources import Split
from advmoe_jax.parallel import batch_spec
from advmoe_jax.types import Array, Axes

_INDICES_AT_ONCE = 2**22  # of images, over the steps that workers are told of at once


@dataclass(frozen=True)
class HostBatches:
    """The images of batches, made in any order, by any process; see ``ahead.Source``.

    Attributes:
        images: uint8 [N, H, W, C], decoded or not.
        indices: int32 [batches, n], which of them stand in each batch.
        draws: float32 [batches, n, 4], of crops out of the whole images, see ``decoding.Crops``;
            None: none.
        least_area: of those crops.
        threads: that decode a batch; None: one for each processor.
    """

    images: np.ndarray | EncodedImages
    indices: np.ndarray
    draws: np.ndarray | None = None
    least_area: float = 1.0
    threads: int | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> np.ndarray:
        """uint8 [n, H, W, C]."""
        at = self.indices[number]
        if not isinstance(self.images, EncodedImages):
            return self.images[at]
        crops = None if self.draws is None else Crops(self.draws[number], self.least_area)
        return self.images.decoded(at, crops, self.threads)


class Placement:
    """Which part of a global batch this process makes, and how its devices get theirs.

    Args:
        mesh: the devices that share every batch, each a contiguous part of it.
        batch_size: of the global batch, a multiple of the number of devices.
    """

    def __init__(self, mesh: Mesh, batch_size: int) -> None:
        self._sharding, self._size = NamedSharding(mesh, batch_spec(mesh)), batch_size
        places = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        every = np.arange(batch_size)
        self.positions = np.unique(np.concatenate([every[place] for place in places]))

    def put(self, images: np.ndarray, labels: np.ndarray) -> DeviceData:
        """The global batch on the devices, of what stands at this process's positions."""

        def part(array: np.ndarray) -> Array:
            def of_device(where: tuple[slice, ...]) -> np.ndarray:
                wanted = np.arange(self._size)[where[0]]
                return array[np.searchsorted(self.positions, wanted)]

            return jax.make_array_from_callback(
                (self._size, *array.shape[1:]), self._sharding, of_device
            )

        return DeviceData(part(images), part(labels))


def _read_own(
    data: DeviceData, positions: Indices, indices: Indices, axis_name: Axes | None
) -> tuple[Pixels, Indices]:
    del positions, indices, axis_name
    return data.images, data.labels


def _read_others(
    data: DeviceData, positions: Indices, indices: Indices, axis_name: Axes | None
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
        workers: processes that decode images that are not decoded; see ``ahead.made``.

    Raises:
        UserError: if there cannot be such workers.
    """

    reader = Reader(own=_read_own, others=_read_others)

    def __init__(self, split: Split, mesh: Mesh, recipe: BatchRecipe, workers: int = 0) -> None:
        check_workers(workers)
        self._split, self.recipe, self._mesh = split, recipe, mesh
        self.spec = batch_spec(mesh)
        self._workers = workers if isinstance(split.images, EncodedImages) else 0

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
        self, order_key: Key[Array, ""], step_key: Key[Array, ""], start: int, stop: int
    ) -> Generator[DeviceData]:
        """The batches, made ahead; every process makes its devices' parts.

        Raises:
            UserError: if an image cannot be decoded.
        """
        of_epoch = self.steps_per_epoch
        # Workers start anew for each stretch, which is long if epochs are short.
        stretch = max(1, _INDICES_AT_ONCE // (of_epoch * self.recipe.batch_size)) * of_epoch
        while start < stop:
            end = min(stop, start - start % of_epoch + stretch)
            yield from self._stretch(order_key, step_key, start, end)
            start = end

    def _stretch(
        self, order_key: Key[Array, ""], step_key: Key[Array, ""], start: int, stop: int
    ) -> Generator[DeviceData]:
        recipe, of_epoch = self.recipe, self.steps_per_epoch
        placement = Placement(self._mesh, recipe.batch_size)
        indices, draws = [], []
        for epoch in range(start // of_epoch, -(-stop // of_epoch)):
            first = epoch * of_epoch
            steps = jnp.arange(max(start, first), min(stop, first + of_epoch))
            order = epoch_order(order_key, epoch, self.images_per_epoch)
            found = _indices_of_steps(recipe, order, step_key, first, steps)
            indices.append(np.asarray(found)[:, placement.positions])
            if recipe.crop_whole:
                drawn = _draws_of_steps(recipe.batch_size, step_key, steps)
                draws.append(np.asarray(drawn)[:, placement.positions])
        batches = HostBatches(
            self._split.images,
            np.concatenate(indices),
            np.concatenate(draws) if draws else None,
            recipe.crop_area,
            threads=1 if self._workers else None,
        )
        yield from _on_devices(batches, self._split.labels, placement, self._workers)


class Streamed:
    """A split that is measured on and stays with the host; see ``pipeline.put``.

    Args:
        split: images uint8 [N, H, W, C], decoded or not, and labels int32 [N].
        mesh: the devices that share every batch.
    """

    def __init__(self, split: Split, mesh: Mesh) -> None:
        self.images, self.labels = split
        self._mesh = mesh

    def batches(self, indices: Sequence[np.ndarray]) -> Generator[DeviceData]:
        """The images at these indices, batches of one size; made ahead by a thread.

        Raises:
            UserError: if an image cannot be decoded.
        """
        if not indices:
            return
        placement = Placement(self._mesh, len(indices[0]))
        wanted = np.stack(indices)[:, placement.positions]
        yield from _on_devices(HostBatches(self.images, wanted), self.labels, placement, 0)


def _on_devices(
    batches: HostBatches, labels: np.ndarray, placement: Placement, workers: int
) -> Generator[DeviceData]:
    """The batches, each on the devices before it is asked for."""
    images = made(batches, workers)
    pairs = zip(images, batches.indices, strict=True)
    try:
        yield from ahead(placement.put(image, labels[at]) for image, at in pairs)
    finally:
        images.close()


@partial(jax.jit, static_argnums=0)
def _indices_of_steps(
    recipe: BatchRecipe,
    order: Int[Array, " n"],
    key: Key[Array, ""],
    first_step: Int[Array, ""] | int,
    steps: Int[Array, " steps"],
) -> Int[Array, "steps batch"]:
    """Of steps of one epoch, which is in that order and begins with that step."""
    positions = jnp.arange(recipe.batch_size, dtype=jnp.int32)

    def of_step(step: Int[Array, ""]) -> Indices:
        own = jax.random.fold_in(key, step)
        return batch_indices(order, step - first_step, own, recipe, positions)

    return jax.vmap(of_step)(steps)


@partial(jax.jit, static_argnums=0)
def _draws_of_steps(
    batch_size: int, key: Key[Array, ""], steps: Int[Array, " steps"]
) -> Float[Array, "steps batch 4"]:
    def of_image(step_key: Key[Array, ""], position: Int[Array, ""]) -> Float[Array, " 4"]:
        # Of the root of augmentation in ``batch.training_batch``; 0 and 1 are taken there.
        own = jax.random.fold_in(jax.random.split(step_key)[0], position)
        return jax.random.uniform(jax.random.fold_in(own, 2), (4,))

    def of_step(step: Int[Array, ""]) -> Float[Array, "batch 4"]:
        step_key = jax.random.fold_in(key, step)
        return jax.vmap(of_image, (None, 0))(step_key, jnp.arange(batch_size, dtype=jnp.int32))

    return jax.vmap(of_step)(steps)
