"""How images reach the device: the whole set once, then each batch by index inside jit.

A data set of this kind fits in a chip's memory (CIFAR-10 is 180 MB as uint8), so a step reads,
augments and converts its own batch there, and no host stands between two steps.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.data.augment import augment, cutmix_boxes, paste, to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError

if TYPE_CHECKING:
    from advmoe_jax.data.stream import Stream


class DeviceData(NamedTuple):
    """A split on the device: images uint8 [N, H, W, C], labels int32 [N]."""

    images: jax.Array
    labels: jax.Array


class Mixture(NamedTuple):
    """What goes into training batches besides the training images themselves.

    Attributes:
        extra_images: so many images at the end of the data are extra ones, generated say; an epoch
            is a pass over the others.
        extra_per_batch: how many of a batch's images are drawn from them, with replacement (as do
            Wang et al., ICML 2023); spread evenly over the batch, hence over devices and
            microbatches.
        cutmix: probability that an image gets a rectangle of another image of the batch, and its
            label in proportion (Yun et al., ICCV 2019; one rectangle per image, not per batch).
        cutmix_alpha: of the Beta distribution of the share that is left.
        num_classes: needed by CutMix, whose labels are distributions.
    """

    extra_images: int = 0
    extra_per_batch: int = 0
    cutmix: float = 0.0
    cutmix_alpha: float = 1.0
    num_classes: int = 0

    def own_images(self, data: "DeviceData | Stream") -> int:
        """How many images an epoch passes over."""
        return len(data.labels) - self.extra_images

    def steps_per_epoch(self, data: "DeviceData | Stream", batch_size: int) -> int:
        """Full batches in a pass over the images that are not extra."""
        return self.own_images(data) // (batch_size - self.extra_per_batch)


def put(split: Split, mesh: Mesh | None = None) -> DeviceData:
    """Copies a split to every device of the mesh, or to the default device.

    With several processes each gives its own copy of the same split, and its own devices are filled
    from it: nothing travels between hosts.
    """
    split = Split(*map(np.asarray, split))
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
    mixture: Mixture = Mixture(),  # noqa: B008
    streamed: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This device's part of one training batch, augmented; runs inside jit.

    Batches are full: the `N % batch_size` images at the end of `order` sit out that epoch, and
    other images the next. All devices together get exactly the images and keys that one would get.

    Args:
        data: N images, whole on each device; behind them the mixture's extra ones, if any.
        order: int32 [N], the epoch's order, from `permutation`.
        step_in_epoch: which batch of the epoch; may be traced.
        batch_size: of the global batch, B; a device takes b = B / devices.
        key: the step's own; may be traced.
        crop_padding: see `augment.random_crop`.
        flip: see `augment.augment`.
        axis_name: see `shard_of`.
        mixture: extra images and CutMix.
        streamed: `data` is this device's part of the batch already.

    Returns:
        Images float32 [b, H, W, C] in [0, 1]; labels int32 [b], or, under CutMix, distributions
        over the classes float32 [b, K]; and a fresh key per image [b] for
        the step's own noise (random starts, ...), independent of the augmentation's.

    Raises:
        UserError: a batch is larger than the data set, or cannot be shared equally.
    """
    num_images = order.shape[0]
    if batch_size - mixture.extra_per_batch > num_images:
        raise UserError(
            f"a batch of {batch_size} is more than the {num_images} training images: give a smaller"
            " one"
        )
    positions = shard_of(batch_size, axis_name)

    def take_at(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        if streamed:
            return take(_whole(data, axis_name), positions)
        return take(data, batch_indices(order, step_in_epoch, batch_size, key, mixture, positions))

    images, labels = data if streamed else take_at(positions)
    # Two roots, then positions: split(key)[i] equals fold_in(key, i), so drawing both kinds of key
    # from one root would give some image's noise the key of another's crop.
    roots = jax.random.split(key)
    augment_keys, noise_keys = (_fold(root, positions) for root in roots)
    images = augment(images, augment_keys, crop_padding, flip)
    if mixture.cutmix:
        # The other images are made again: they may be another device's.
        partners = jax.random.permutation(jax.random.fold_in(key, 3), batch_size)[positions]
        others, other_labels = take_at(partners)
        others = augment(others, _fold(roots[0], partners), crop_padding, flip)
        mix_keys = _fold(jax.random.fold_in(key, 4), positions)
        images, labels = _cutmix((images, labels), (others, other_labels), mix_keys, mixture)
    return to_float(images), labels, noise_keys


def _fold(key: jax.Array, positions: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def _whole(data: DeviceData, axis_name: str | None) -> DeviceData:
    """All devices' parts of a batch."""
    if axis_name is None:
        return data
    return DeviceData(*(jax.lax.all_gather(part, axis_name, tiled=True) for part in data))


def batch_indices(
    order: jax.Array,
    step_in_epoch: jax.Array | int,
    batch_size: int,
    key: jax.Array,
    mixture: Mixture,
    positions: jax.Array,
) -> jax.Array:
    """Which images of the data stand at those positions of the global batch."""
    count = mixture.extra_per_batch
    if not count:
        return order[step_in_epoch * batch_size + positions]
    before = np.arange(batch_size + 1) * count // batch_size  # extra images before a position
    is_extra, own = np.diff(before) > 0, np.arange(batch_size) - before[:-1]
    start = step_in_epoch * (batch_size - count)
    # An own image's place; behind the last one stand extra images, where the value is not used.
    place = jnp.minimum(start + jnp.asarray(own, jnp.int32)[positions], len(order) - 1)
    extra_keys = _fold(jax.random.fold_in(key, 2), positions)
    drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, mixture.extra_images))(extra_keys)
    return jnp.where(jnp.asarray(is_extra)[positions], len(order) + drawn, order[place])


def _cutmix(
    own: tuple[jax.Array, jax.Array],
    others: tuple[jax.Array, jax.Array],
    keys: jax.Array,
    mixture: Mixture,
) -> tuple[jax.Array, jax.Array]:
    """Mixed images, and distributions over the classes float32 [b, K], of two times both."""
    chosen_keys, box_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    boxes = cutmix_boxes(box_keys, *own[0].shape[1:3], mixture.cutmix_alpha)
    chosen = jax.vmap(lambda k: jax.random.bernoulli(k, mixture.cutmix))(chosen_keys)
    images, share = paste(own[0], others[0], jnp.where(chosen[:, None], boxes, 0))
    label, other = (jax.nn.one_hot(part[1], mixture.num_classes) for part in (own, others))
    return images, share[:, None] * label + (1 - share[:, None]) * other


def evaluation_batches(num_images: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Every image once, in order, in batches of one static shape.

    Yields:
        Indices int32 [batch_size], and how many of them count: the last batch is filled up by
        repeating the last index.
    """
    for start in range(0, num_images, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        yield np.minimum(indices, num_images - 1), min(batch_size, num_images - start)
