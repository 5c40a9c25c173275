"""Images that stay encoded until they are read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from advmoe_jax import memory
from advmoe_jax.data import decoding
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.decoding import Crops, Encoded, decode, to_array
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.sources import carve_validation, load
from advmoe_jax.errors import UserError


def encode(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(seed, height=6, width=5, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def folder_of(root, *arrays):
    """A directory with one class; the last array is the test image."""
    for i, array in enumerate(arrays):
        directory = root / ("train" if i + 1 < len(arrays) else "test") / "a"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{i}.png").write_bytes(encode(array))
    return str(root)


@pytest.fixture
def folder(tmp_path):
    """Four training images and one test image of each of two classes, one class grey."""
    for split, count in (("train", 4), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(count):
                channels = 1 if name == "dog" and split == "train" else 3
                content = encode(pixels(10 * label + i, channels=channels))
                (directory / f"{i}.png").write_bytes(content)
    return tmp_path


def test_streamed_images_are_those_of_a_decoded_set(folder, monkeypatch):
    decoded = load("image_folder", str(folder))
    calls, decode_one = [], decoding.decode_one

    def counted(item, *arguments):
        calls.append(item.name)
        return decode_one(item, *arguments)

    monkeypatch.setattr(decoding, "decode_one", counted)
    streamed = load("image_folder", str(folder), stream=True)
    assert calls == []
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
    grey = [Encoded("grey", 0, encode(pixels(2, channels=1)))]
    assert decode(grey, 0).shape == (1, 6, 5, 1)
    assert decode(grey, 0, (6, 5, 3)).shape == (1, 6, 5, 3)


def test_a_grey_set_has_one_channel(tmp_path):
    grey = [pixels(seed, channels=1) for seed in range(3)]
    dataset = load("image_folder", folder_of(tmp_path, *grey))
    np.testing.assert_array_equal(dataset.train.images, np.stack(grey[:2])[..., None])
    np.testing.assert_array_equal(dataset.test.images, grey[2][None, ..., None])


def test_one_coloured_image_makes_the_set_coloured(tmp_path):
    grey, colour = pixels(0, channels=1), pixels(1)
    dataset = load("image_folder", folder_of(tmp_path, grey, grey, colour))
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(dataset.train.images, [expected, expected])
    np.testing.assert_array_equal(dataset.test.images, [colour])


@pytest.mark.parametrize("wide", [True, False])
def test_resizing_keeps_the_centre(tmp_path, wide):
    image = pixels(0, 6, 18) if wide else pixels(0, 18, 6)
    path = folder_of(tmp_path, image, pixels(1, 9, 9), pixels(2, 6, 17))
    native = load("image_folder", path, 6)
    centre = image[:, 6:12] if wide else image[6:12]
    np.testing.assert_array_equal(native.train.images[0], centre)
    # an odd border: the centre to the nearest pixel, not blurred by half of one
    np.testing.assert_array_equal(native.test.images[0], pixels(2, 6, 17)[:, 5:11])

    small = load("image_folder", path, 4).train.images
    resized = Image.fromarray(image).resize((12, 4) if wide else (4, 12), Image.Resampling.BILINEAR)
    resized = np.asarray(resized)
    np.testing.assert_array_equal(small[0], resized[:, 4:8] if wide else resized[4:8])
    expected = Image.fromarray(pixels(1, 9, 9)).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small[1], np.asarray(expected))


def test_a_long_thin_image_is_never_blown_up_whole(tmp_path):
    line = np.full((1, 30_000, 3), 9, np.uint8)  # 224 * 30,000 * 224 pixels, were it resized whole
    dataset = load("image_folder", folder_of(tmp_path, line, line), 224)
    np.testing.assert_array_equal(dataset.train.images, np.full((1, 224, 224, 3), 9))


def test_images_of_two_sizes_need_an_image_size(refusal, tmp_path):
    path = folder_of(tmp_path, pixels(0), pixels(1), pixels(2, 7, 5), pixels(3, 8, 8))
    message = refusal(load, "image_folder", path)
    assert "train/a/2.png is 5x7" in message and "5x6" in message and "image_size" in message


def test_sixteen_bits_are_not_clipped_in_silence(refusal, tmp_path):
    path = folder_of(tmp_path, np.full((4, 4), 40_000, np.uint16), pixels(0))
    message = refusal(load, "image_folder", path)
    assert "train/a/0.png" in message and "8-bit" in message


@pytest.mark.parametrize("size", [(9000, 9000), (13_000, 13_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_name(refusal, tmp_path, recwarn, size):
    path = folder_of(tmp_path, pixels(0), pixels(1), pixels(2))
    image = tmp_path / "train/a/0.png"
    header = bytearray(image.read_bytes())
    header[16:24] = struct.pack(">II", *size)  # of IHDR, which is checked by its own sum
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    image.write_bytes(bytes(header))
    message = refusal(load, "image_folder", path)
    assert f"{image.relative_to(tmp_path)} " in message and "67,108,864 pixels" in message
    assert not recwarn.list  # Pillow's own advice would be the second line


@pytest.mark.parametrize("size, said", [(9000, "pixels"), (100_000, "pixels"), (8000, "GiB")])
def test_an_image_size_that_memory_cannot_hold(refusal, tmp_path, monkeypatch, size, said):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**28)
    path = folder_of(tmp_path, pixels(0), pixels(1), pixels(2))
    message = refusal(load, "image_folder", path, image_size=size)
    assert "image_size" in message and said in message
    assert "image_size" in refusal(load, "digits", image_size=size)


def test_a_crop_of_a_whole_image_is_a_rectangle_of_it():
    # Linear in its coordinates, an image says by its corners which rectangle was cut out.
    rows, columns = np.mgrid[:90, :120]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    draws = np.random.default_rng(0).random((200, 4), np.float32)
    for draw in [*draws, np.zeros(4), np.ones(4), np.array([0, 1, 1, 1.0])]:
        found = to_array(image, 32, Crops(draw, 0.2)).astype(float)
        assert found.shape == (32, 32, 3)
        # Of 32 pixels the outermost centres are 31/32 of the side apart.
        height, width = (found[-1, 0, 0] - found[0, 0, 0], found[0, -1, 1] - found[0, 0, 1])
        height, width = height * 32 / 31, width * 32 / 31
        assert height <= 91.5 and width <= 121.5
        area, ratio = height * width / (90 * 120), width / height
        wanted, wanted_ratio = 0.2 + 0.8 * draw[0], (4 / 3) ** (2 * draw[1] - 1)
        if (wanted * 10800 * wanted_ratio) ** 0.5 <= 120 and (
            wanted * 10800 / wanted_ratio
        ) ** 0.5 <= 90:
            np.testing.assert_allclose((area, ratio), (wanted, wanted_ratio), rtol=0.08)
    # The corners of the draws are the corners of the image.
    first, last = (
        to_array(image, 32, Crops(np.array(d), 0.2)) for d in ((0, 0.5, 0, 0), (0, 0.5, 1, 1))
    )
    assert first[0, 0, 0] <= 2 and first[0, 0, 1] <= 2
    assert last[-1, -1, 0] >= 87 and last[-1, -1, 1] >= 117


def test_all_of_a_whole_image_is_the_image_stretched():
    image = Image.fromarray(pixels(0, 6, 8))
    found = to_array(
        image, 4, Crops(np.array([1.0, (np.log(8 / 6) / np.log(4 / 3) + 1) / 2, 0, 0]), 0.5)
    )
    np.testing.assert_array_equal(
        found, np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR))
    )


def test_encoded_images_stand_in_the_place_of_an_array():
    items = [Encoded(f"{i}.png", i, encode(pixels(i))) for i in range(5)]
    encoded, array = EncodedImages(items, (6, 5, 3), 0), np.stack([pixels(i) for i in range(5)])
    assert (encoded.shape, encoded.dtype, len(encoded)) == (array.shape, array.dtype, 5)
    for at in (slice(1, 4), np.array([4, 0]), np.array([4, 0])[:1]):
        np.testing.assert_array_equal(encoded[at], array[at])
    np.testing.assert_array_equal(encoded[1:][1:][0], array[2])
    np.testing.assert_array_equal(to_float(encoded), to_float(array))
    assert repr(encoded) == repr(encoded[:]) != repr(encoded[::-1])
