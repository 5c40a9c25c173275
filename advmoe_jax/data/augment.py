"""Random crops and flips on the device: each image has its own key.

What happens to an image depends on its key alone, so a batch gives the same images however it is
split over devices. Only JAX's default generator (threefry) promises that under vmap.
"""

import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array) -> jax.Array:
    """uint8 images [...] in 0..255 as float32 in [0, 1]; 255 becomes exactly 1.

    Images that are float32 already stay as they are.
    """
    if images.dtype == jnp.float32:
        return images
    # A product, because XLA turns a division by a constant into one: eager and compiled code agree.
    return images.astype(jnp.float32) * np.float32(1 / 255)


def random_crop(images: jax.Array, keys: jax.Array, padding: int) -> jax.Array:
    """Moves each image by a random offset: zero padding, then a crop of the original size.

    Args:
        images: [B, H, W, C], any dtype; values are moved, never changed.
        keys: typed keys [B].
        padding: pixels added on each side; the offset is uniform in 0..2*padding per axis. 0
            returns the images as they are.
    """
    if padding == 0:
        return images
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
        return jax.lax.dynamic_slice(image, (row, column, 0), images.shape[1:])

    return jax.vmap(crop)(padded, keys)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Mirrors each image [B, H, W, C] left to right with probability 1/2: typed keys [B]."""
    flipped = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def resized_crop(images: jax.Array, keys: jax.Array, least_area: float) -> jax.Array:
    """Cuts a random rectangle out of each image, and stretches it to the image's size.

    The crops of Inception and of the ViT recipes (Szegedy et al., CVPR 2015, section 6): a share of
    the area uniform in [least_area, 1], a ratio of the sides log-uniform in [3/4, 4/3] (sides no
    longer than the image), a uniform place; resized linearly.

    Args:
        images: [B, H, W, C], any dtype; integers are rounded.
        keys: typed keys [B].
        least_area: in (0, 1]; 1 returns the images as they are.
    """
    if least_area == 1:
        return images
    sides = np.array(images.shape[1:3], np.float32)

    def crop(image: jax.Array, key: jax.Array) -> jax.Array:
        area_key, ratio_key, place_key = jax.random.split(key, 3)
        area = jax.random.uniform(area_key, minval=least_area, maxval=1.0)
        ratio = jnp.exp(jax.random.uniform(ratio_key, minval=-1.0, maxval=1.0) * np.log(4 / 3))
        share = jnp.minimum(jnp.sqrt(area * jnp.stack([1 / ratio, ratio])), 1.0)
        corner = jax.random.uniform(place_key, (2,)) * (1 - share) * sides
        resized = jax.image.scale_and_translate(
            image.astype(jnp.float32), image.shape, (0, 1), 1 / share, -corner / share, "linear",
            antialias=False,
        )  # fmt: skip
        is_integer = jnp.issubdtype(image.dtype, jnp.integer)
        return (jnp.round(resized) if is_integer else resized).astype(image.dtype)

    return jax.vmap(crop)(images, keys)


def augment(
    images: jax.Array, keys: jax.Array, crop_padding: int, flip: bool, crop_area: float = 1.0
) -> jax.Array:
    """The usual augmentation of small images: a random crop, then a flip if ``flip``.

    Args:
        images: [B, H, W, C], uint8 or float32.
        keys: typed keys [B].
        crop_padding: see ``random_crop``; 0 for no crop.
        flip: False where a mirrored image is another class (digits).
        crop_area: see ``resized_crop``; 1 for no such crop.

    Returns:
        [B, H, W, C] of the images' dtype.
    """
    crop_keys, flip_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    images = random_crop(images, crop_keys, crop_padding)
    if crop_area < 1:
        folded = jax.vmap(jax.random.fold_in, (0, None))(crop_keys, 1)
        images = resized_crop(images, folded, crop_area)
    return random_flip(images, flip_keys) if flip else images


def cutmix_boxes(keys: jax.Array, height: int, width: int, alpha: float) -> jax.Array:
    """The rectangles that CutMix replaces (Yun et al., ICCV 2019, eq. 2), one per image.

    A share lambda ~ Beta(alpha, alpha) of the image is to stay; the rectangle has the image's
    proportions, its centre is uniform over the image, and what lies outside is cut off.

    Args:
        keys: typed keys [B].
        height: of the images.
        width: of the images.
        alpha: 1 for the paper's uniform lambda.

    Returns:
        int32 [B, 4]: first row, last row + 1, first column, last column + 1; may be empty.
    """

    def box(key: jax.Array) -> jax.Array:
        share_key, *centre_keys = jax.random.split(key, 3)
        cut = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
        ends = []
        for size, centre_key in zip((height, width), centre_keys, strict=True):
            half = (size * cut).astype(jnp.int32) // 2
            centre = jax.random.randint(centre_key, (), 0, size)
            ends += [jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)]
        return jnp.stack(ends)

    return jax.vmap(box)(keys)


def paste(images: jax.Array, others: jax.Array, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images with the rectangles of others in them, and the share of each that is left.

    Args:
        images: [B, H, W, C].
        others: likewise.
        boxes: int32 [B, 4], see ``cutmix_boxes``.

    Returns:
        [B, H, W, C], and float32 [B] in [0, 1]: the pixels that are the image's own over all.
    """
    height, width = images.shape[1:3]
    top, bottom, left, right = (boxes[:, i, None] for i in range(4))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= top) & (rows < bottom))[:, :, None]
    inside &= ((columns >= left) & (columns < right))[:, None, :]
    share = 1 - jnp.mean(inside, axis=(1, 2), dtype=jnp.float32)
    return jnp.where(inside[..., None], others, images), share
