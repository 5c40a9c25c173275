"""Images that stay encoded until they are read."""

import io

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data import decoding
from advmoe_jax.data.decoding import Encoded, EncodedImages, decode
from advmoe_jax.data.sources import carve_validation, load
from advmoe_jax.errors import UserError


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(seed, channels=3):
    shape = (6, 5, 3) if channels == 3 else (6, 5)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Four training images and one test image of each of two classes, one class grey."""
    for split, count in (("train", 4), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(count):
                channels = 1 if name == "dog" and split == "train" else 3
                content = encode(pixels(10 * label + i, channels))
                (directory / f"{i}.png").write_bytes(content)
    return tmp_path


def test_streamed_images_are_those_of_a_decoded_set(folder, monkeypatch):
    decoded = load("image_folder", str(folder))
    calls, decode_one = [], decoding._decode_one

    def counted(item, image_size):
        calls.append(item.name)
        return decode_one(item, image_size)

    monkeypatch.setattr(decoding, "_decode_one", counted)
    streamed = load("image_folder", str(folder), stream=True)
    assert len([name for name in calls if "train" in name]) == 0
    assert streamed.train.images.shape == (8, 6, 5, 3) == decoded.train.images.shape
    np.testing.assert_array_equal(streamed.train.labels, decoded.train.labels)
    rest, validation = carve_validation(streamed.train, 0.25, 3)
    rest_decoded, validation_decoded = carve_validation(decoded.train, 0.25, 3)
    np.testing.assert_array_equal(rest.images, rest_decoded.images)
    np.testing.assert_array_equal(validation.images, validation_decoded.images)
    calls.clear()
    np.testing.assert_array_equal(rest.images[np.array([4, 0])], rest_decoded.images[[4, 0]])
    assert len(calls) == 2


def test_a_file_that_vanished_is_named_when_it_is_read(folder):
    streamed = load("image_folder", str(folder), stream=True)
    (folder / "train" / "cat" / "2.png").unlink()
    with pytest.raises(UserError, match=r"cat/2\.png cannot be decoded"):
        np.asarray(streamed.train.images[np.array([2])])


def test_sizes_and_colours_must_be_those_of_the_test_images():
    items = [Encoded("one", 0, encode(pixels(0))), Encoded("two", 0, encode(pixels(1)))]
    with pytest.raises(UserError, match=r"one is 5x6, the images before it are 4x6"):
        np.asarray(EncodedImages(items, (6, 4, 3), 0))
    with pytest.raises(UserError, match=r"one is in colour, but the test images are grey"):
        np.asarray(EncodedImages(items, (6, 5, 1), 0))
    grey = [Encoded("grey", 0, encode(pixels(2, 1)))]
    assert decode(grey, 0).shape == (1, 6, 5, 1)
    assert decode(grey, 0, (6, 5, 3)).shape == (1, 6, 5, 3)
