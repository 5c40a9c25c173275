"""Named data sets, parts set aside for validation, and the real archives where they are at hand."""

import os

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data.sources import Split, carve_validation, load


def test_digits_are_all_there_in_a_fixed_split():
    from sklearn.datasets import load_digits

    dataset = load("digits")
    assert dataset.name == "digits" and dataset.class_names == tuple("0123456789")
    assert dataset.train.images.shape == (1437, 8, 8, 1)
    assert dataset.test.images.shape == (360, 8, 8, 1)
    assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32

    def rows(images, labels):
        return sorted(zip(images.reshape(len(images), -1).tolist(), labels.tolist(), strict=True))

    original = load_digits()
    scaled = np.array([round(value * 255 / 16) for value in range(17)])[original.images.astype(int)]
    together = [np.concatenate(parts) for parts in zip(dataset.train, dataset.test, strict=True)]
    assert rows(*together) == rows(scaled, original.target)
    assert set(dataset.test.labels.tolist()) == set(range(10))
    # Pinned: results of one version must stay comparable with another's.
    assert dataset.test.labels[:12].tolist() == [6, 6, 6, 2, 5, 6, 6, 2, 2, 1, 1, 9]


def test_digits_resized():
    dataset = load("digits", image_size=12)
    assert dataset.train.images.shape == (1437, 12, 12, 1)
    native = Image.fromarray(load("digits").test.images[0, ..., 0])
    expected = np.asarray(native.resize((12, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(dataset.test.images[0, ..., 0], expected)


def test_digits_have_two_splits(refusal):
    message = refusal(load, "digits", test_split="validation")
    assert "'validation'" in message and "test, train" in message


def test_a_negative_image_size(refusal):
    assert "-1" in refusal(load, "digits", image_size=-1)


@pytest.mark.parametrize(
    ("source", "nearest"), [("digit", "digits"), ("imagefolder", "image_folder"), ("cifar", None)]
)
def test_an_unknown_source_gets_the_valid_ones(refusal, source, nearest):
    message = refusal(load, source)
    assert repr(source) in message and "digits, image_folder, tfds:<name>" in message
    assert ("did you mean" in message) == (nearest is not None)
    if nearest:
        assert f"did you mean {nearest}?" in message


def test_tfds_needs_a_name(refusal):
    assert "'tfds:'" in refusal(load, "tfds:")


def numbered(count):
    labels = np.arange(count, dtype=np.int32)
    return Split(
        np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (count, 2, 2, 1)), labels
    )


def test_validation_is_a_part_of_the_training_images():
    train = numbered(50)
    rest, validation = carve_validation(train, 0.1, seed=3)
    assert len(rest.labels) == 45 and len(validation.labels) == 5
    assert sorted([*rest.labels, *validation.labels]) == list(range(50))
    for split in (rest, validation):
        np.testing.assert_array_equal(split.images[:, 0, 0, 0], split.labels)
    again = carve_validation(train, 0.1, seed=3)[1]
    np.testing.assert_array_equal(validation.labels, again.labels)
    other = carve_validation(train, 0.1, seed=4)[1]
    assert set(validation.labels.tolist()) != set(other.labels.tolist())


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_validation_fraction_outside_its_range(refusal, fraction):
    assert f"fraction is {fraction}" in refusal(carve_validation, numbered(50), fraction, 0)


@pytest.mark.parametrize(("fraction", "taken"), [(0.001, 0), (0.999, 50)])
def test_a_validation_fraction_that_leaves_nothing(refusal, fraction, taken):
    message = refusal(carve_validation, numbered(50), fraction, 0)
    assert str(fraction) in message and f"{taken} of 50 images" in message


ARCHIVE_FOLDER = os.environ.get("ADVMOE_DATA", "")
needs_archives = pytest.mark.skipif(
    not ARCHIVE_FOLDER, reason="ADVMOE_DATA does not name the folder with the real archives"
)


@needs_archives
@pytest.mark.slow
def test_cifar10():
    dataset = load("image_folder", f"{ARCHIVE_FOLDER}/cifar10_jpeg.tar.gz")
    assert dataset.name == "cifar10_jpeg"
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert dataset.test.images.shape == (10_000, 32, 32, 3)
    assert len(dataset.class_names) == 10 and dataset.class_names[0] == "airplane"
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1000] * 10)
    # CIFAR-10's published mean, within what JPEG loses
    mean = dataset.train.images.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=0.002)


@needs_archives
def test_mnist():
    dataset = load("image_folder", f"{ARCHIVE_FOLDER}/mnist_png.tar.gz")
    assert dataset.train.images.shape == (17_435, 28, 28, 1)
    assert dataset.test.images.shape == (10_000, 28, 28, 1)
    assert dataset.class_names == tuple("0123456789")
    # The test set's published class counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), counts)


@needs_archives
def test_tiny_imagenet():
    archive = f"{ARCHIVE_FOLDER}/tiny-imagenet-21.tar.gz"
    dataset = load("image_folder", archive, test_split="val")
    assert dataset.train.images.shape == (10_500, 64, 64, 3)
    assert len(dataset.class_names) == 21 and dataset.class_names[0] == "n01443537"
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), [50] * 21)
