"""Extra images: what is read, and what is said of a file that cannot be used."""

import zipfile

import numpy as np
import pytest

from advmoe_jax.data.extra import load_extra
from advmoe_jax.errors import UserError

SHAPE, CLASSES = (4, 5, 3), 10


def arrays(**changes):
    rng = np.random.default_rng(0)
    good = {
        "images": rng.integers(256, size=(6, *SHAPE)).astype(np.uint8),
        "labels": rng.integers(CLASSES, size=6),
    }
    return {name: array for name, array in (good | changes).items() if array is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i2"])
def test_images_and_labels_are_read(tmp_path, save, dtype):
    given = arrays()
    save(tmp_path / "x.npz", images=given["images"], labels=given["labels"].astype(dtype))
    images, labels = load_extra(str(tmp_path / "x.npz"), SHAPE, CLASSES)
    np.testing.assert_array_equal(images, given["images"])
    np.testing.assert_array_equal(labels, given["labels"])
    assert images.dtype == np.uint8 and labels.dtype == np.int32


def test_images_of_one_colour_are_read_however_well_they_are_packed(tmp_path):
    images = np.zeros((5000, *SHAPE), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.zeros(5000, int))
    assert len(load_extra(str(tmp_path / "x.npz"), SHAPE, CLASSES).labels) == 5000


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("the file's code was run",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "holds no array 'images', but labels; it needs images and labels"),
        ({"labels": None}, "holds no array 'labels', but images;"),
        ({"images": np.zeros((6, *SHAPE))}, "images is of dtype float64, it must be uint8"),
        ({"images": np.zeros((6, *SHAPE), np.uint16)}, "images is of dtype uint16"),
        ({"images": np.array([Malicious()])}, "images is of dtype object"),
        ({"labels": np.zeros(6)}, "labels is of dtype float64, it must be integers"),
        ({"images": np.zeros((6, 4, 5, 1), np.uint8)}, r"shape \(6, 4, 5, 1\), the .* \(4, 5, 3\)"),
        ({"images": np.zeros((0, *SHAPE), np.uint8)}, "images has shape"),
        ({"labels": np.zeros((6, 1), int)}, r"labels has shape \(6, 1\) for 6 images"),
        ({"labels": np.zeros(5, int)}, r"labels has shape \(5,\) for 6 images"),
        ({"labels": np.arange(6) + 5}, r"labels lie in 5\.\.10; the training images have 10"),
        ({"labels": np.arange(6) - 1}, r"labels lie in -1\.\.4"),
    ],
)
def test_an_array_that_will_not_do_is_named(tmp_path, changes, message):
    np.savez(tmp_path / "x.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message) as caught:
        load_extra(str(tmp_path / "x.npz"), SHAPE, CLASSES)
    assert "\n" not in str(caught.value) and "x.npz" in str(caught.value)


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"extra_path=.*x\.npz cannot be read: No such file"):
        load_extra(str(path), SHAPE, CLASSES)
    path.write_bytes(b"PK no zip at all")
    with pytest.raises(UserError, match=r"x\.npz is damaged, or no \.npz file"):
        load_extra(str(path), SHAPE, CLASSES)
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"x\.npz is damaged"):
        load_extra(str(path), SHAPE, CLASSES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"nothing")
    with pytest.raises(UserError, match="images is damaged: "):
        load_extra(str(path), SHAPE, CLASSES)


def test_flipped_bytes_are_noticed(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    content[content.find(b"NUMPY") + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is damaged"):
        load_extra(str(path), SHAPE, CLASSES)


@pytest.mark.parametrize("count", [10**9, 10**15])
def test_a_size_that_the_file_does_not_have_is_not_believed(tmp_path, count):
    path, header = tmp_path / "x.npz", tmp_path / "header"
    with header.open("wb") as file:
        shape = {"descr": "|u1", "fortran_order": False, "shape": (count, *SHAPE)}
        np.lib.format.write_array_header_1_0(file, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.read_bytes())
    with pytest.raises(UserError, match=f"should have {count * 60} bytes by its header"):
        load_extra(str(path), SHAPE, CLASSES)


def test_a_file_in_a_bucket(bucket, tmp_path):
    given = arrays()
    np.savez(tmp_path / "x.npz", **given)
    (bucket / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes())
    images, _ = load_extra(str(bucket / "x.npz"), SHAPE, CLASSES)
    np.testing.assert_array_equal(images, given["images"])
    with pytest.raises(UserError, match="does not exist"):
        load_extra(str(bucket / "y.npz"), SHAPE, CLASSES)
