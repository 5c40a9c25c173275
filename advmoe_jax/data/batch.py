"""What a step is fed: one batch, taken and augmented inside jit; nothing here holds images.

All devices together get exactly the images and keys that one would get.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int, Key, UInt8

from advmoe_jax.data.augment import augment, cutmix_boxes, paste, to_float
from advmoe_jax.errors import UserError
from advmoe_jax.types import Array, Axes

Pixels = UInt8[Array, "batch height width channels"]
Indices = Int[Array, " batch"]
Keys = Key[Array, " batch"]


class DeviceData(NamedTuple):
    """Images on the device, and their labels: a whole split, or a batch of it."""

    images: UInt8[Array, "n height width channels"]
    labels: Int[Array, " n"]


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
        num_classes: needed by CutMix and mixup, whose labels are distributions.
        mixup: alpha; each image is averaged with another one of the batch, and so is its label, the
            larger share being its own, by Beta(alpha, alpha) (Zhang et al., ICLR 2018); 0: none.
    """

    extra_images: int = 0
    extra_per_batch: int = 0
    cutmix: float = 0.0
    cutmix_alpha: float = 1.0
    num_classes: int = 0
    mixup: float = 0.0


class BatchRecipe(NamedTuple):
    """How the batches of a run are made.

    Attributes:
        batch_size: of the global batch.
        crop_padding: see ``augment.random_crop``, in pixels.
        flip: see ``augment.augment``.
        mixture: extra images, CutMix and mixup.
        crop_area: see ``augment.resized_crop``.
        crop_whole: whether such crops are cut out of whole images by what decodes them, and not out
            of decoded ones inside jit; see ``stream.Stream``.
    """

    batch_size: int
    crop_padding: int = 0
    flip: bool = False
    mixture: Mixture = Mixture()
    crop_area: float = 1.0
    crop_whole: bool = False


# (what the step reads, positions in the global batch, the images there as indices of the whole
# data, names of the mesh axes) -> images and labels at those positions
Read = Callable[[DeviceData, Indices, Indices, Axes | None], tuple[Pixels, Indices]]


class Reader(NamedTuple):
    """How a device takes images of the batch out of what its step reads; runs inside jit.

    Attributes:
        own: takes the positions that are this device's.
        others: takes any positions, of which some may be another device's.
    """

    own: Read
    others: Read


class Feed(Protocol):
    """The training images of a run, wherever they lie, and what each step reads of them.

    Attributes:
        reader: how a device takes its part; the same object for all feeds of a kind, since compiled
            steps are shared by it.
        spec: how what a step reads is spread over the mesh.
        recipe: how batches are made.
    """

    reader: Reader
    spec: PartitionSpec
    recipe: BatchRecipe

    @property
    def size(self) -> int:
        """Number of images, extra ones included."""
        ...

    @property
    def shapes(self) -> DeviceData:
        """Shapes and dtypes of what a step reads."""
        ...

    def batches(
        self, order_key: Key[Array, ""], step_key: Key[Array, ""], start: int, stop: int
    ) -> Generator[DeviceData]:
        """What each step of a run reads, or of a part of it.

        Args:
            order_key: of the run, see ``loop.Task``.
            step_key: likewise.
            start: the first step of the run that is wanted.
            stop: the one behind the last.

        Raises:
            UserError: if an image cannot be read.
        """
        ...

    @property
    def images_per_epoch(self) -> int:
        """How many images an epoch passes over: those that are not extra."""
        return self.size - self.recipe.mixture.extra_images

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in a pass over the images that are not extra."""
        own = self.recipe.batch_size - self.recipe.mixture.extra_per_batch
        return self.images_per_epoch // own


def permutation(key: Key[Array, ""], num_images: int) -> Int[Array, " n"]:
    """A random order: int32, each index below ``num_images`` once."""
    return jax.random.permutation(key, jnp.arange(num_images, dtype=jnp.int32))


@partial(jax.jit, static_argnums=2)
def epoch_order(order_key: Key[Array, ""], epoch: int, num_images: int) -> Int[Array, " n"]:
    """The order of an epoch of the run that has that key."""
    return permutation(jax.random.fold_in(order_key, epoch), num_images)


def take(data: DeviceData, indices: Indices) -> tuple[Pixels, Indices]:
    """Images and labels at indices."""
    return data.images[indices], data.labels[indices]


def shard_of(batch_size: int, axis_name: Axes | None) -> Indices:
    """The positions in the global batch that this device holds, int32 [batch_size / devices].

    Args:
        batch_size: of the global batch.
        axis_name: the mesh axes that batches are split over, inside shard_map or pmap; each device
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
    reader: Reader,
    data: DeviceData,
    order: Int[Array, " n"],
    step_in_epoch: Int[Array, ""] | int,
    key: Key[Array, ""],
    recipe: BatchRecipe,
    axis_name: Axes | None = None,
) -> tuple[
    Float[Array, "part height width channels"],
    Int[Array, " part"] | Float[Array, "part classes"],
    Keys,
]:
    """This device's part of one training batch, augmented; runs inside jit.

    Batches are full: the ``n % batch_size`` images at the end of ``order`` sit out that epoch, and
    other images the next. All devices together get exactly the images and keys that one would get.

    Args:
        reader: of the feed.
        data: what the step reads.
        order: int32, the epoch's order, from ``epoch_order``.
        step_in_epoch: which batch of the epoch; may be traced.
        key: the step's own; may be traced.
        recipe: how the batch is made.
        axis_name: see ``shard_of``.

    Returns:
        Images float32 in [0, 1]; labels int32, or, if images are mixed, distributions over the
        classes float32; and a fresh key per image for the step's own noise (random starts, ...),
        independent of the augmentation's.

    Raises:
        UserError: a batch is larger than the data set, or cannot be shared equally.
    """
    batch_size, mixture = recipe.batch_size, recipe.mixture
    if batch_size - mixture.extra_per_batch > len(order):
        raise UserError(
            f"a batch of {batch_size} is more than the {len(order)} training images: give a smaller"
            " one"
        )
    positions = shard_of(batch_size, axis_name)

    def read(take_at: Read, positions: Indices) -> tuple[Pixels, Indices]:
        indices = batch_indices(order, step_in_epoch, key, recipe, positions)
        return take_at(data, positions, indices, axis_name)

    images, labels = read(reader.own, positions)
    # Two roots, then positions: split(key)[i] equals fold_in(key, i), so drawing both kinds of key
    # from one root would give some image's noise the key of another's crop.
    roots = jax.random.split(key)
    augment_keys, noise_keys = (_fold(root, positions) for root in roots)
    area = 1.0 if recipe.crop_whole else recipe.crop_area
    moves = (recipe.crop_padding, recipe.flip, area)
    images = augment(images, augment_keys, *moves)
    if mixture.cutmix or mixture.mixup:
        # The other images are made again: they may be another device's.
        partners = jax.random.permutation(jax.random.fold_in(key, 3), batch_size)[positions]
        others, other_labels = read(reader.others, partners)
        others = augment(others, _fold(roots[0], partners), *moves)
        mix_keys = _fold(jax.random.fold_in(key, 4), positions)
        pair = (images, labels), (others, other_labels)
        if mixture.mixup:
            images, labels = _mixup(*pair, mix_keys, mixture)
            return images, labels, noise_keys
        images, labels = _cutmix(*pair, mix_keys, mixture)
    return to_float(images), labels, noise_keys


def _fold(key: Key[Array, ""], positions: Indices) -> Keys:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def batch_indices(
    order: Int[Array, " n"],
    step_in_epoch: Int[Array, ""] | int,
    key: Key[Array, ""],
    recipe: BatchRecipe,
    positions: Indices,
) -> Indices:
    """Which images of the data stand at those positions of the global batch."""
    batch_size, count = recipe.batch_size, recipe.mixture.extra_per_batch
    if not count:
        return order[step_in_epoch * batch_size + positions]
    before = np.arange(batch_size + 1) * count // batch_size  # extra images before a position
    is_extra, own = np.diff(before) > 0, np.arange(batch_size) - before[:-1]
    start = step_in_epoch * (batch_size - count)
    # An own image's place; behind the last one stand extra images, where the value is not used.
    place = jnp.minimum(start + jnp.asarray(own, jnp.int32)[positions], len(order) - 1)
    extra_keys = _fold(jax.random.fold_in(key, 2), positions)
    num_extra = recipe.mixture.extra_images
    drawn = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_extra))(extra_keys)
    return jnp.where(jnp.asarray(is_extra)[positions], len(order) + drawn, order[place])


def _cutmix(
    own: tuple[Pixels, Indices],
    others: tuple[Pixels, Indices],
    keys: Keys,
    mixture: Mixture,
) -> tuple[Pixels, Float[Array, "batch classes"]]:
    """Mixed images, and distributions over the classes, of two times both."""
    chosen_keys, box_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    boxes = cutmix_boxes(box_keys, *own[0].shape[1:3], mixture.cutmix_alpha)
    chosen = jax.vmap(lambda k: jax.random.bernoulli(k, mixture.cutmix))(chosen_keys)
    images, share = paste(own[0], others[0], jnp.where(chosen[:, None], boxes, 0))
    label, other = (jax.nn.one_hot(part[1], mixture.num_classes) for part in (own, others))
    return images, share[:, None] * label + (1 - share[:, None]) * other


def _mixup(
    own: tuple[Pixels, Indices], others: tuple[Pixels, Indices], keys: Keys, mixture: Mixture
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Averages of images float32 in [0, 1], and of their labels."""
    drawn = jax.vmap(lambda k: jax.random.beta(k, mixture.mixup, mixture.mixup))(keys)
    share = jnp.maximum(drawn, 1 - drawn)

    def mean(one: Array, other: Array) -> Array:
        of_own = share.reshape(-1, *[1] * (one.ndim - 1))
        return of_own * one + (1 - of_own) * other

    labels = (jax.nn.one_hot(part[1], mixture.num_classes) for part in (own, others))
    return mean(to_float(own[0]), to_float(others[0])), mean(*labels)
