"""What images exist: each source becomes the same two arrays, read once into host memory.

Nothing here knows JAX or the network; ``pipeline`` carries the arrays to the device.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from advmoe_jax.data import decoding
from advmoe_jax.data.decoding import Encoded, to_array
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.folders import no_such_split, read_folder
from advmoe_jax.data.prepared import Records, read_prepared
from advmoe_jax.errors import UserError

SOURCES = ("digits", "image_folder", "tfds:<name>")


class Split(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8 [N, H, W, C], C is 1 or 3, or the same still encoded.
        labels: int32 [N] in [0, number of classes).
    """

    images: np.ndarray | EncodedImages
    labels: np.ndarray


class Dataset(NamedTuple):
    """A classification data set.

    Attributes:
        name: of the data set.
        train: the images to train on.
        test: the images to measure on.
        class_names: ``class_names[label]`` is a label's name.
        skipped: how many files lie among its images that are none.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: int = 0


def load(
    source: str,
    path: str = "",
    image_size: int = 0,
    train_split: str = "train",
    test_split: str = "test",
    stream: bool = False,
) -> Dataset:
    """Reads a whole data set into memory, in an order that never changes.

    Args:
        source: ``digits`` (scikit-learn's 1,797 digits, 8x8x1; a fixed 20% are the test set);
            ``image_folder`` (PNG and JPEG files ``<path>/<split>/<class>/**``, classes sorted by
            name; or, as Tiny-ImageNet has its validation split, ``<split>/images/*`` with the class
            of each file in ``<split>/<split>_annotations.txt``);
            ``tfds:<name>`` (a data set prepared by TensorFlow Datasets, read without TensorFlow).
        path: for ``image_folder`` the directory, or an archive of it (.tar.gz, .tgz, .tar, .zip:
            read in memory, nothing is unpacked), either with at most one directory around the
            splits; for ``tfds`` its data_dir, empty for the default; not used by ``digits``.
        image_size: 0 keeps the native size, which all images must then share; otherwise the shorter
            side is resized to it (bilinear) and the centre is kept.
        train_split: the split to train on.
        test_split: the split to measure on.
        stream: leave the images encoded (in their files, if ``path`` is a directory or a prepared
            data set) until they are read; not for ``digits``.

    Returns:
        The two splits; images have one channel if every image of both is grey, else three. Streamed
        images have as many as the test images.

    Raises:
        UserError: an unknown source or split, missing or damaged data, images of different sizes
            with ``image_size=0``, more than 64 MiB in one file or 64 GiB in all.
    """
    if image_size < 0:
        raise UserError(f"image_size is {image_size}: give 0 for the native size, or pixels")
    if source == "digits":
        return _digits(image_size, train_split, test_split)
    skipped = 0
    if source == "image_folder":
        name, class_names, train, test, skipped = read_folder(path, train_split, test_split)
    elif source.startswith("tfds:") and source != "tfds:":
        name = source.removeprefix("tfds:")
        class_names, train, test = read_prepared(name, path, train_split, test_split, stream)
    else:
        near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown data source {source!r}: {hint}it is one of {', '.join(SOURCES)}")
    labels = np.concatenate([_labels(train), _labels(test)])
    cut = len(train)
    if stream:
        shape = decoding.shape_of(test, image_size)
        of_train, of_test = (EncodedImages(items, shape, image_size) for items in (train, test))
    else:
        images = decoding.decode([*train, *test], image_size)
        of_train, of_test = images[:cut], images[cut:]
    splits = Split(of_train, labels[:cut]), Split(of_test, labels[cut:])
    return Dataset(name, *splits, class_names, skipped)


def carve_validation(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Sets a random part of the training images aside: (rest, validation).

    Args:
        train: N images and labels.
        fraction: the part of them to set aside, in (0, 1), rounded to whole images.
        seed: which part; the same seed gives the same part.

    Raises:
        UserError: fraction outside (0, 1), or either part would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the validation fraction is {fraction}: give one between 0 and 1")
    num_images = len(train.labels)
    size = round(num_images * fraction)
    if size in (0, num_images):
        raise UserError(
            f"a validation fraction of {fraction} takes {size} of {num_images} images: give one"
            " that leaves some for validation and some for training"
        )
    order = np.random.default_rng(seed).permutation(num_images)
    validation, rest = order[:size], order[size:]
    return (
        Split(train.images[rest], train.labels[rest]),
        Split(train.images[validation], train.labels[validation]),
    )


def _labels(items: Sequence[Encoded]) -> np.ndarray:
    """int32 [n]; of records no image is made for it, of which there may be millions."""
    if isinstance(items, Records):
        return items.labels
    return np.array([item.label for item in items], np.int32)


def _digits(image_size: int, train_split: str, test_split: str) -> Dataset:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size:
        decoding.check_total(len(images), image_size, image_size)
        images = np.stack([to_array(Image.fromarray(i[..., 0]), image_size) for i in images])
    labels = digits.target.astype(np.int32)
    # They come without a test set; a constant seed measures every run on the same one.
    order = np.random.default_rng(0).permutation(len(labels))
    num_test = -(-len(labels) // 5)
    splits = {
        "train": Split(images[order[num_test:]], labels[order[num_test:]]),
        "test": Split(images[order[:num_test]], labels[order[:num_test]]),
    }
    for split in (train_split, test_split):
        if split not in splits:
            raise no_such_split(split, splits, "digits")
    names = tuple(str(name) for name in digits.target_names)
    return Dataset("digits", splits[train_split], splits[test_split], names)
