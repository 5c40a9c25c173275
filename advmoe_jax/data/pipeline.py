"""How images reach the device: the whole set once, then each batch by index inside jit.

A data set of this kind fits in a chip's memory (CIFAR-10 is 180 MB as uint8), so a step reads,
augments and converts its own batch there, and no host stands between two steps.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.data.augment import augment, to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError


class DeviceData(NamedTuple):
    """A split on the device: images uint8 [N, H, W, C], labels int32 [N]."""

    images: jax.Array
    labels: jax.Array


def put(split: Split, mesh: Mesh | None = None) -> DeviceData:
    """Copies a split to every device of the mesh, or to the default device.

    With several processes each gives its own copy of the same split, and its own devices are filled
    from it: nothing travels between hosts.
    """
    if mesh is None:
        return DeviceData(*(jax.device_put(array) for array in split))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return DeviceData(
        *(
            jax.make_array_from_callback(array.shape, everywhere, array.__getitem__)
            for array in split
        )
    )


def permutation(key: jax.Array, num_images: int) -> jax.Array:
    """The order of one epoch: int32 [num_images], each index once."""
    return jax.random.permutation(key, jnp.arange(num_images, dtype=jnp.int32))


def take(data: DeviceData, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images uint8 [B, H, W, C] and labels int32 [B] at indices int32 [B]."""
    return data.images[indices], data.labels[indices]


def shard_of(batch_size: int, axis_name: str | None) -> jax.Array:
    """The positions in the global batch that this device holds, int32 [batch_size / devices].

    Args:
        batch_size: of the global batch.
        axis_name: the mesh axis that batches are split over, inside shard_map or pmap; each device
            holds a contiguous part. None: one device holds all.

    Raises:
        UserError: the devices cannot share the batch equally.
    """
    if axis_name is None:
        return jnp.arange(batch_size, dtype=jnp.int32)
    num_devices = jax.lax.axis_size(axis_name)
    if batch_size % num_devices:
        raise UserError(
            f"a batch of {batch_size} cannot be shared equally by {num_devices} devices: give a"
            f" multiple of {num_devices}"
        )
    size = batch_size // num_devices
    return jax.lax.axis_index(axis_name) * size + jnp.arange(size, dtype=jnp.int32)


def training_batch(
    data: DeviceData,
    order: jax.Array,
    step_in_epoch: jax.Array | int,
    batch_size: int,
    key: jax.Array,
    crop_padding: int,
    flip: bool,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This device's part of one training batch, augmented; runs inside jit.

    Batches are full: the `N % batch_size` images at the end of `order` sit out that epoch, and
    other images the next. All devices together get exactly the images and keys that one would get.

    Args:
        data: N images, whole on each device.
        order: int32 [N], the epoch's order, from `permutation`.
        step_in_epoch: which batch, in 0..N // batch_size - 1; may be traced.
        batch_size: of the global batch, B; a device takes b = B / devices.
        key: the step's own; may be traced.
        crop_padding: see `augment.random_crop`.
        flip: see `augment.augment`.
        axis_name: see `shard_of`.

    Returns:
        Images float32 [b, H, W, C] in [0, 1], labels int32 [b], and a fresh key per image [b] for
        the step's own noise (random starts, ...), independent of the augmentation's.

    Raises:
        UserError: a batch is larger than the data set, or cannot be shared equally.
    """
    num_images = order.shape[0]
    if batch_size > num_images:
        raise UserError(
            f"a batch of {batch_size} is more than the {num_images} training images: give a smaller"
            " one"
        )
    positions = shard_of(batch_size, axis_name)
    images, labels = take(data, order[step_in_epoch * batch_size + positions])
    # Two roots, then positions: split(key)[i] equals fold_in(key, i), so drawing both kinds of key
    # from one root would give some image's noise the key of another's crop.
    augment_keys, noise_keys = (
        jax.vmap(jax.random.fold_in, in_axes=(None, 0))(part, positions)
        for part in jax.random.split(key)
    )
    return to_float(augment(images, augment_keys, crop_padding, flip)), labels, noise_keys


def evaluation_batches(num_images: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Every image once, in order, in batches of one static shape.

    Yields:
        Indices int32 [batch_size], and how many of them count: the last batch is filled up by
        repeating the last index.
    """
    for start in range(0, num_images, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(indices, num_images - 1), min(batch_size, num_images - start)
