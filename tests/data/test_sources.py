import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data import decoding, sources
from advmoe_jax.data.sources import Split, carve_validation, load
from advmoe_jax.errors import UserError

ARCHIVES = sources.ARCHIVE_SUFFIXES


def refusal(function, *args, **kwargs):
    """The message that a mistake ends in: always one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pixels(seed, height=6, width=5, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encode(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


# The same small data set everywhere: names out of order, a directory inside a class, both cases of
# suffix, and beside the images what must be passed over.
PIXELS = {
    "train/dog/b.png": pixels(0),
    "train/dog/a.PNG": pixels(1),
    "train/cat/more/z.png": pixels(2),
    "train/cat/m.png": pixels(3),
    "test/dog/a.png": pixels(4),
    "test/cat/a.png": pixels(5),
}
FILES = {
    **{name: encode(array) for name, array in PIXELS.items()},
    "readme.txt": b"beside the splits",
    "train/list.txt": b"beside the classes",
    "train/dog/notes.txt": b"beside the images",
    "train/dog/._b.png": b"left by macOS",
    "__MACOSX/train/dog/b.png": b"left by macOS",
    ".git/train/cat/b.png": b"hidden",
}
IN_ORDER = ["train/cat/m.png", "train/cat/more/z.png", "train/dog/a.PNG", "train/dog/b.png"]


def write_directory(root, files):
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def write_archive(path, files, top=""):
    """An archive of `files`, in an order that sorting must mend; None makes a directory."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in reversed(files.items()):
                archive.writestr(top + name + ("/" if content is None else ""), content or b"")
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(top + name)
            if content is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def check_small_set(dataset):
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_array_equal(dataset.train.images, [PIXELS[name] for name in IN_ORDER])
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(
        dataset.test.images, [PIXELS["test/cat/a.png"], PIXELS["test/dog/a.png"]]
    )
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


# -------------------------------------------------------------------------------------- digits


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


def test_digits_have_two_splits():
    message = refusal(load, "digits", test_split="validation")
    assert "'validation'" in message and "test, train" in message


# ------------------------------------------------------------------------------- image folders


def test_a_directory(tmp_path):
    root = write_directory(tmp_path / "pets", FILES)
    dataset = load("image_folder", str(root))
    assert dataset.name == "pets"
    check_small_set(dataset)


def test_a_directory_around_the_splits(tmp_path):
    write_directory(tmp_path / "outer" / "pets", FILES)
    check_small_set(load("image_folder", str(tmp_path / "outer")))


@pytest.mark.parametrize("top", ["", "./", "pets/", "./pets/"])
@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_is_read_without_being_unpacked(tmp_path, monkeypatch, suffix, top):
    path = write_archive(tmp_path / f"pets{suffix}", FILES, top)
    monkeypatch.chdir(tmp_path)
    dataset = load("image_folder", str(path))
    assert dataset.name == "pets"
    check_small_set(dataset)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["directory", *ARCHIVES])
def test_splits_have_the_names_that_are_asked_for(tmp_path, kind):
    files = {
        "fit/a/1.png": encode(pixels(0)),
        "measure/a/1.png": encode(pixels(1)),
        "broken/a/1.png": b"of a split that nobody asked for",
    }
    if kind == "directory":
        path = write_directory(tmp_path / "set", files)
    else:
        path = write_archive(tmp_path / f"set{kind}", files)
    dataset = load("image_folder", str(path), train_split="fit", test_split="measure")
    np.testing.assert_array_equal(dataset.train.images[0], pixels(0))
    np.testing.assert_array_equal(dataset.test.images[0], pixels(1))


def folder(tmp_path, *arrays, kind="PNG"):
    """A directory with one class; the last array is the test image."""
    names = [f"train/a/{i}.png" for i in range(len(arrays) - 1)] + ["test/a/0.png"]
    files = {name: encode(array, kind) for name, array in zip(names, arrays, strict=True)}
    return str(write_directory(tmp_path / "set", files))


def test_jpeg(tmp_path):
    root = write_directory(
        tmp_path,
        {
            f"{s}/a/{s}.{e}": encode(pixels(0), "JPEG")
            for s, e in [("train", "jpg"), ("test", "JPEG")]
        },
    )
    decoded = np.asarray(Image.open(root / "train/a/train.jpg"))
    dataset = load("image_folder", str(root))
    np.testing.assert_array_equal(dataset.train.images[0], decoded)
    np.testing.assert_array_equal(dataset.test.images[0], decoded)


def test_a_grey_set_has_one_channel(tmp_path):
    grey = [pixels(seed, channels=1) for seed in range(3)]
    dataset = load("image_folder", folder(tmp_path, *grey))
    np.testing.assert_array_equal(dataset.train.images, np.stack(grey[:2])[..., None])
    np.testing.assert_array_equal(dataset.test.images, grey[2][None, ..., None])


def test_one_coloured_image_makes_the_set_coloured(tmp_path):
    grey, colour = pixels(0, channels=1), pixels(1)
    dataset = load("image_folder", folder(tmp_path, grey, grey, colour))
    expected = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(dataset.train.images, [expected, expected])
    np.testing.assert_array_equal(dataset.test.images, [colour])


def test_transparency_and_palettes_become_plain_colour(tmp_path):
    colour = pixels(0)
    transparent = np.dstack([colour, np.full(colour.shape[:2], 200, np.uint8)])
    buffer = io.BytesIO()
    two_colours = np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(3, 0)
    Image.fromarray(two_colours).convert("P", palette=Image.Palette.ADAPTIVE).save(buffer, "PNG")
    files = {"train/a/1.png": encode(transparent), "test/a/1.png": encode(colour)}
    dataset = load("image_folder", str(write_directory(tmp_path / "alpha", files)))
    np.testing.assert_array_equal(dataset.train.images, [colour])
    files = {"train/a/1.png": buffer.getvalue(), "test/a/1.png": encode(two_colours)}
    dataset = load("image_folder", str(write_directory(tmp_path / "palette", files)))
    np.testing.assert_array_equal(dataset.train.images, [two_colours])


@pytest.mark.parametrize("wide", [True, False])
def test_resizing_keeps_the_centre(tmp_path, wide):
    image = pixels(0, 6, 18) if wide else pixels(0, 18, 6)
    path = folder(tmp_path, image, pixels(1, 9, 9), pixels(2, 6, 17))
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
    dataset = load("image_folder", folder(tmp_path, line, line), 224)
    np.testing.assert_array_equal(dataset.train.images, np.full((1, 224, 224, 3), 9))


def test_images_of_two_sizes_need_an_image_size(tmp_path):
    path = folder(tmp_path, pixels(0), pixels(1), pixels(2, 7, 5), pixels(3, 8, 8))
    message = refusal(load, "image_folder", path)
    assert "train/a/2.png is 5x7" in message and "5x6" in message and "image_size" in message


def test_a_negative_image_size():
    assert "-1" in refusal(load, "digits", image_size=-1)


@pytest.mark.parametrize(
    "content", [b"", b"no image", encode(pixels(0))[:60], encode(pixels(0, 64, 64))[:-2000]]
)
@pytest.mark.parametrize("kind", ["directory", ".tar.gz", ".zip"])
def test_an_undecodable_image_is_named(tmp_path, kind, content):
    files = {**FILES, "train/dog/more/bad.png": content}
    if kind == "directory":
        path = write_directory(tmp_path / "pets", files)
    else:
        path = write_archive(tmp_path / f"pets{kind}", files, "pets/")
    message = refusal(load, "image_folder", str(path), image_size=4)
    assert f"{path}: " in message and "train/dog/more/bad.png" in message


def test_sixteen_bits_are_not_clipped_in_silence(tmp_path):
    path = folder(tmp_path, np.full((4, 4), 40_000, np.uint16), pixels(0))
    message = refusal(load, "image_folder", path)
    assert "train/a/0.png" in message and "8-bit" in message


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    path = folder(tmp_path, pixels(0), pixels(1), pixels(2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    message = refusal(load, "image_folder", path)
    assert "train/a/0.png is too large to decode" in message


@pytest.mark.parametrize("kind", ["directory", *ARCHIVES])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path, monkeypatch, kind):
    files = {**FILES, "train/dog/huge.png": b"\0" * 5000}
    if kind == "directory":
        path = write_directory(tmp_path / "pets", files)
    else:
        path = write_archive(tmp_path / f"pets{kind}", files)
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 4000)
    message = refusal(load, "image_folder", str(path))
    assert "train/dog/huge.png has 5000 bytes" in message


def test_a_bound_holds_for_the_archive_as_a_whole(tmp_path, monkeypatch):
    path = write_archive(tmp_path / "pets.tar.gz", FILES)
    monkeypatch.setattr(decoding, "MAX_TOTAL_BYTES", 300)
    assert "more than the 300" in refusal(load, "image_folder", str(path))


def test_a_bound_holds_for_the_decoded_images(tmp_path, monkeypatch):
    path = write_directory(tmp_path / "pets", FILES)
    monkeypatch.setattr(decoding, "MAX_TOTAL_BYTES", 6 * 100 * 100 * 3 - 1)
    message = refusal(load, "image_folder", str(path), image_size=100)
    assert "6 images of 100x100 need 180000 bytes" in message


def test_links_devices_and_escapes_in_an_archive_are_passed_over(tmp_path):
    path = tmp_path / "pets.tar"
    write_archive(path, {**FILES, "train/../test/dog/up.png": b"x", "../train/dog/up.png": b"x"})
    with tarfile.open(path, "a") as archive:
        for name, kind in [
            ("train/dog/link.png", tarfile.SYMTYPE),
            ("train/dog/hard.png", tarfile.LNKTYPE),
            ("train/dog/device.png", tarfile.CHRTYPE),
            ("train/dog/pipe.png", tarfile.FIFOTYPE),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        absolute = tarfile.TarInfo("/train/dog/absolute.png")
        absolute.size = 1
        archive.addfile(absolute, io.BytesIO(b"x"))
    check_small_set(load("image_folder", str(path)))


def test_links_in_a_zip_are_passed_over(tmp_path):
    path = write_archive(tmp_path / "pets.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("train/dog/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    check_small_set(load("image_folder", str(path)))


def test_a_pipe_in_a_directory_is_passed_over(tmp_path):
    root = write_directory(tmp_path / "pets", FILES)
    os.mkfifo(root / "train/dog/pipe.png")
    check_small_set(load("image_folder", str(root)))


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_cut_anywhere_is_refused(tmp_path, suffix):
    names = ["train/a/1.png", "train/a/2.png", "test/a/1.png"]
    whole = write_archive(tmp_path / f"whole{suffix}", {n: encode(pixels(0)) for n in names})
    content = whole.read_bytes()
    load("image_folder", str(whole))
    # An uncompressed tar is padded with zeros after its end, which nobody misses.
    end = len(content.rstrip(b"\0")) if suffix == ".tar" else len(content)
    cut = tmp_path / f"cut{suffix}"
    lengths = {0, 1, end - 1, *range(100, end, 97)}
    for length in sorted(lengths | set(range(512, end, 512))):
        cut.write_bytes(content[:length])
        assert str(cut) in refusal(load, "image_folder", str(cut)), length


def test_a_damaged_header_does_not_end_a_tar_in_silence(tmp_path):
    names = ["train/a/1.png", "train/a/2.png", "test/a/1.png"]
    path = write_archive(tmp_path / "set.tar", {n: encode(pixels(0)) for n in names})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"train/a/1.png")] ^= (
        1  # the last member: two images are left without it
    )
    path.write_bytes(content)
    message = refusal(load, "image_folder", str(path))
    assert str(path) in message and "damaged header" in message


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_a_wrong_checksum_is_noticed(tmp_path, suffix):
    noise = np.random.default_rng(0).bytes(4000)
    files = {**FILES, "train/dog/noise.png": noise}
    if suffix == ".zip":
        path = write_archive(tmp_path / "pets.zip", files)
        content = path.read_bytes()
    else:
        path = tmp_path / "pets.tar.gz"
        content = gzip.compress(write_archive(tmp_path / "pets.tar", files).read_bytes(), 0)
    damaged = bytearray(content)
    damaged[content.index(noise[100:116])] ^= 1  # noise is stored as it is
    path.write_bytes(damaged)
    assert f"{path} is not a readable" in refusal(load, "image_folder", str(path))


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_what_is_no_archive_is_refused(tmp_path, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(b"<html>404: not found</html>" * 50)
    assert f"{path} is not a readable" in refusal(load, "image_folder", str(path))


def test_paths_that_cannot_be(tmp_path):
    assert "path" in refusal(load, "image_folder")
    missing = tmp_path / "missing"
    assert f"{missing} does not exist" in refusal(load, "image_folder", str(missing))
    text = tmp_path / "images.txt"
    text.write_text("x")
    message = refusal(load, "image_folder", str(text))
    assert str(text) in message and ".tar.gz" in message


@pytest.mark.parametrize("kind", ["directory", ".tar.gz", ".zip"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"test": None}, ["'test'", "it has: extra, train"]),
        ({"test": "empty"}, ["'test'", "no class directories"]),
        ({"train": "empty"}, ["'train'", "no class directories"]),
        ({"train/none": "empty"}, ["train/none", "no images"]),
        ({"test/zebra/1.png": "image"}, ["test/zebra", "'train' lacks"]),
    ],
)
def test_a_layout_that_cannot_be_names_the_culprit(tmp_path, kind, change, expected):
    image = encode(pixels(0))
    files = {"train/cat/1.png": image, "test/cat/1.png": image, "extra/cat/1.png": image}
    [(name, what)] = change.items()
    if what != "image" and "/" not in name:
        files = {key: value for key, value in files.items() if not key.startswith(name)}
    if kind == "directory":
        path = write_directory(tmp_path / "set", files)
        if what == "empty":
            (path / name).mkdir()
        elif what == "image":
            write_directory(path, {name: image})
    else:
        if what:
            files[name] = image if what == "image" else None
        path = write_archive(tmp_path / f"set{kind}", files)
    message = refusal(load, "image_folder", str(path))
    assert all(part in message for part in [str(path), *expected]), message


def annotated(tmp_path, kind, annotations):
    """A set laid out like Tiny-ImageNet: the classes of ``val`` stand in a text file."""
    files = {
        "train/cat/images/0.png": encode(PIXELS["train/cat/m.png"]),
        "train/dog/images/0.png": encode(PIXELS["train/dog/b.png"]),
        "train/dog/dog_boxes.txt": b"0.png\t0\t0\t5\t5\n",
        "val/images/0.png": encode(PIXELS["test/dog/a.png"]),
        "val/images/1.png": encode(PIXELS["test/cat/a.png"]),
        "val/val_annotations.txt": annotations,
        "wnids.txt": b"dog\ncat\n",
    }
    if kind == "directory":
        return write_directory(tmp_path / "set", files)
    return write_archive(tmp_path / f"set{kind}", files, top="tiny/")


@pytest.mark.parametrize("kind", ["directory", ".tar.gz", ".zip"])
def test_classes_of_a_split_may_stand_in_its_annotations(tmp_path, kind):
    path = annotated(tmp_path, kind, b"1.png\tcat\t0\t0\t5\t5\n0.png\tdog\t0\t0\t5\t5\n")
    dataset = load("image_folder", str(path), test_split="val")
    assert dataset.class_names == ("cat", "dog")
    np.testing.assert_array_equal(dataset.train.labels, [0, 1])
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    np.testing.assert_array_equal(
        dataset.test.images, [PIXELS["test/cat/a.png"], PIXELS["test/dog/a.png"]]
    )


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        (b"1.png\tcat\n", ["val/val_annotations.txt", "says nothing of", "0.png"]),
        (b"1.png\tcat\n0.png\tcow\n", ["val/cow", "'train' lacks"]),
        (b"1.png cat\n0.png\tdog\n", ["val/val_annotations.txt", "'1.png cat'", "tab"]),
        (b"", ["says nothing of"]),
    ],
)
def test_annotations_that_cannot_be(tmp_path, annotations, expected):
    path = annotated(tmp_path, ".zip", annotations)
    message = refusal(load, "image_folder", str(path), test_split="val")
    assert all(part in message for part in expected), message


def test_many_splits_are_not_all_listed(tmp_path):
    files = {f"class{i:03}/x/1.png": encode(pixels(0)) for i in range(40)}
    message = refusal(load, "image_folder", str(write_directory(tmp_path, files)))
    assert "class009, ..." in message and "class010" not in message


@pytest.mark.parametrize(
    ("source", "nearest"), [("digit", "digits"), ("imagefolder", "image_folder"), ("cifar", None)]
)
def test_an_unknown_source_gets_the_valid_ones(source, nearest):
    message = refusal(load, source)
    assert repr(source) in message and "digits, image_folder, tfds:<name>" in message
    assert ("did you mean" in message) == (nearest is not None)
    if nearest:
        assert f"did you mean {nearest}?" in message


def test_tfds_needs_a_name():
    assert "'tfds:'" in refusal(load, "tfds:")


# ------------------------------------------------------------------------- TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with a data set that tfds itself prepared, without TensorFlow."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    files = write_directory(tmp_path_factory.mktemp("files"), FILES)

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # tfds asks for importlib_resources, which it does not install, if the name has a dot.
        __module__ = "tiny_pets"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "coarse": tfds.features.ClassLabel(names=["animal"]),
                        "image": tfds.features.Image(),
                        "label": tfds.features.ClassLabel(names=["dog", "cat"]),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, download_manager):
            return {
                "train": self._generate_examples("train"),
                "test": self._generate_examples("test"),
                "unlabelled": self._generate_examples("test", label=-1),
            }

        def _generate_examples(self, split, label=None):
            for name in PIXELS:
                if name.startswith(split):
                    label_name = name.split("/")[1] if label is None else label
                    yield name, {"coarse": 0, "image": str(files / name), "label": label_name}

    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")
    TinyPets(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture
def no_network(monkeypatch):
    """The addresses that anything asked for, which must stay none."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def by_content(split):
    return {image.tobytes(): label for image, label in zip(split.images, split.labels, strict=True)}


def expected_by_content(prefix, names):
    return {
        array.tobytes(): names.index(name.split("/")[1])
        for name, array in PIXELS.items()
        if name.startswith(prefix)
    }


def test_tfds_prepared(prepared, no_network):
    dataset = load("tfds:tiny_pets", str(prepared))
    assert dataset.name == "tiny_pets" and dataset.class_names == ("dog", "cat")
    assert by_content(dataset.train) == expected_by_content("train", ["dog", "cat"])
    assert by_content(dataset.test) == expected_by_content("test", ["dog", "cat"])
    assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32
    again = load("tfds:tiny_pets:1.0.0", str(prepared))
    np.testing.assert_array_equal(dataset.train.images, again.train.images)
    assert no_network == []


def test_tfds_slices_and_resizing(prepared):
    dataset = load("tfds:tiny_pets", str(prepared), 3, "train[:50%]", "train[50%:]")
    assert dataset.train.images.shape == dataset.test.images.shape == (2, 3, 3, 3)


def test_tfds_is_read_without_tensorflow(prepared, tmp_path):
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = (
        "from advmoe_jax.data.sources import load;"
        f"print(load('tfds:tiny_pets', {str(prepared)!r}).train.images.shape)"
    )
    repository = str(Path(sources.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), repository])},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "(4, 6, 5, 3)\n", result.stderr


@pytest.mark.parametrize("name", ["cifar10", "no_such_set"])
def test_tfds_not_prepared_gives_the_command(tmp_path, no_network, name):
    message = refusal(load, f"tfds:{name}", str(tmp_path / "with space"))
    assert f"tfds:{name} is not prepared in {tmp_path}/with space" in message
    assert message.endswith(
        "`pip install tensorflow importlib_resources && python -c 'import tensorflow_datasets as"
        f' tfds; tfds.builder("{name}", data_dir="{tmp_path}/with space",'
        ' file_format="array_record").download_and_prepare()\'`'
    )
    assert no_network == []


def test_tfds_default_directory_needs_no_data_dir(no_network):
    message = refusal(load, "tfds:no_such_set")
    assert ' tfds.builder("no_such_set", file_format="array_record")' in message
    assert no_network == []


def test_tfds_unknown_empty_and_unlabelled_splits(prepared):
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="validation")
    assert "tfds:tiny_pets has no split 'validation'" in message
    assert "test, train, unlabelled" in message
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="unlabelled")
    assert "'unlabelled'" in message and "no labels" in message
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="train[:0]")
    assert "'train[:0]'" in message


def copy_with(prepared, tmp_path, change, file):
    """The prepared set with one of its files changed."""
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / "tiny_pets" / "1.0.0" / file
    path.write_bytes(change(path.read_bytes()))
    return str(tmp_path / "copy")


def test_tfds_of_another_format_gives_the_command(prepared, tmp_path):
    def as_tfrecord(content):
        return json.dumps({**json.loads(content), "fileFormat": "tfrecord"}).encode()

    path = copy_with(prepared, tmp_path, as_tfrecord, "dataset_info.json")
    message = refusal(load, "tfds:tiny_pets", path)
    assert f"tfds:tiny_pets in {path}/tiny_pets/1.0.0 is not in the array_record" in message
    assert f'tfds.builder("tiny_pets", data_dir="{path}", file_format="array_record")' in message


def test_tfds_that_is_not_image_classification(prepared, tmp_path):
    def without_classes(content):
        content = json.loads(content)
        content["featuresDict"]["features"]["label"] = content["featuresDict"]["features"]["image"]
        return json.dumps(content).encode()

    path = copy_with(prepared, tmp_path, without_classes, "features.json")
    assert "tfds:tiny_pets is not a set of 8-bit images" in refusal(load, "tfds:tiny_pets", path)


def test_tfds_damaged(prepared, tmp_path):
    path = copy_with(prepared, tmp_path, lambda content: b"{", "dataset_info.json")
    assert "tfds:tiny_pets cannot be opened" in refusal(load, "tfds:tiny_pets", path)


def test_tfds_damaged_records(prepared, tmp_path):
    file = "tiny_pets-train.array_record-00000-of-00001"
    path = copy_with(prepared, tmp_path, lambda content: content[:100], file)
    message = refusal(load, "tfds:tiny_pets", path)
    assert f"split 'train' of tfds:tiny_pets in {path}/tiny_pets/1.0.0 cannot be read" in message


# ---------------------------------------------------------------------------------- validation


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
def test_a_validation_fraction_outside_its_range(fraction):
    assert f"fraction is {fraction}" in refusal(carve_validation, numbered(50), fraction, 0)


@pytest.mark.parametrize(("fraction", "taken"), [(0.001, 0), (0.999, 50)])
def test_a_validation_fraction_that_leaves_nothing(fraction, taken):
    message = refusal(carve_validation, numbered(50), fraction, 0)
    assert str(fraction) in message and f"{taken} of 50 images" in message


# -------------------------------------------------------------------------------- real archives


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
