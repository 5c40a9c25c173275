"""Folders and archives of images: what is read, in what order, and what is refused."""

import gzip
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data import decoding
from advmoe_jax.data.folders import ARCHIVE_SUFFIXES as ARCHIVES
from advmoe_jax.data.sources import load
from advmoe_jax.errors import UserError


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


@pytest.mark.parametrize(
    "content", [b"", b"no image", encode(pixels(0))[:60], encode(pixels(0, 64, 64))[:-2000]]
)
@pytest.mark.parametrize("kind", ["directory", ".tar.gz", ".zip"])
def test_an_undecodable_image_is_named(refusal, tmp_path, kind, content):
    files = {**FILES, "train/dog/more/bad.png": content}
    if kind == "directory":
        path = write_directory(tmp_path / "pets", files)
    else:
        path = write_archive(tmp_path / f"pets{kind}", files, "pets/")
    message = refusal(load, "image_folder", str(path), image_size=4)
    assert f"{path}: " in message and "train/dog/more/bad.png" in message


@pytest.mark.parametrize("kind", ["directory", *ARCHIVES])
def test_a_huge_file_is_refused_before_it_is_read(refusal, tmp_path, monkeypatch, kind):
    files = {**FILES, "train/dog/huge.png": b"\0" * 5000}
    if kind == "directory":
        path = write_directory(tmp_path / "pets", files)
    else:
        path = write_archive(tmp_path / f"pets{kind}", files)
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 4000)
    message = refusal(load, "image_folder", str(path))
    assert "train/dog/huge.png has 5000 bytes" in message


def test_a_bound_holds_for_the_archive_as_a_whole(refusal, tmp_path, monkeypatch):
    path = write_archive(tmp_path / "pets.tar.gz", FILES)
    monkeypatch.setattr(decoding, "MAX_TOTAL_BYTES", 300)
    assert "more than the 300" in refusal(load, "image_folder", str(path))


def test_a_bound_holds_for_the_decoded_images(refusal, tmp_path, monkeypatch):
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
    found = load("image_folder", str(path))
    check_small_set(found)
    assert found.skipped == 3  # notes.txt, and the links: they may have been images


def test_links_in_a_zip_are_passed_over(tmp_path):
    path = write_archive(tmp_path / "pets.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("train/dog/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    found = load("image_folder", str(path))
    check_small_set(found)
    assert found.skipped == 2


def test_hidden_directories_are_passed_over_everywhere(tmp_path):
    files = FILES | {"train/dog/.ipynb_checkpoints/b.png": FILES["train/dog/b.png"]}
    check_small_set(load("image_folder", str(write_directory(tmp_path / "pets", files))))
    check_small_set(load("image_folder", str(write_archive(tmp_path / "pets.tar", files))))


def test_a_link_to_a_directory_inside_a_class_is_refused(refusal, tmp_path):
    root = write_directory(tmp_path / "pets", FILES)
    (root / "train/dog/more").symlink_to(root / "train/cat/more")
    assert "train/dog/more is a link to a directory: put" in refusal(
        load, "image_folder", str(root)
    )


def test_a_directory_that_cannot_be_read_is_named(refusal, tmp_path, monkeypatch):
    root = write_directory(tmp_path / "pets", FILES)
    walk = os.walk

    def refusing(top, onerror):
        yield from walk(top)
        onerror(PermissionError(13, "Permission denied", f"{top}/more"))

    monkeypatch.setattr(os, "walk", refusing)
    assert "more cannot be read (Permission denied): mend or remove it" in refusal(
        load, "image_folder", str(root)
    )


@pytest.mark.parametrize("size", [-1, -512])
def test_a_member_of_negative_size_ends_the_reading(refusal, tmp_path, size):
    path = write_archive(tmp_path / "pets.tar", FILES)
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo("train/dog/c.png").tobuf(tarfile.GNU_FORMAT)
    field = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    header = bytearray(header[:124] + field + header[136:])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + bytes(content))
    assert "has no plain size" in refusal(load, "image_folder", str(path))


def test_images_must_fit_into_the_memory_of_the_machine(refusal, tmp_path, monkeypatch):
    path = write_archive(tmp_path / "pets.zip", FILES)
    monkeypatch.setattr("advmoe_jax.memory.machine_bytes", lambda: 200)
    assert "of memory at the least, and this machine has" in refusal(
        load, "image_folder", str(path)
    )


def test_a_pipe_in_a_directory_is_passed_over(tmp_path):
    root = write_directory(tmp_path / "pets", FILES)
    os.mkfifo(root / "train/dog/pipe.png")
    check_small_set(load("image_folder", str(root)))


@pytest.mark.parametrize("suffix", ARCHIVES)
def test_an_archive_cut_anywhere_is_refused(refusal, tmp_path, suffix):
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


def test_a_damaged_header_does_not_end_a_tar_in_silence(refusal, tmp_path):
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
def test_a_wrong_checksum_is_noticed(refusal, tmp_path, suffix):
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
def test_what_is_no_archive_is_refused(refusal, tmp_path, suffix):
    path = tmp_path / f"pets{suffix}"
    path.write_bytes(b"<html>404: not found</html>" * 50)
    assert f"{path} is not a readable" in refusal(load, "image_folder", str(path))


def test_paths_that_cannot_be(refusal, tmp_path):
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
def test_a_layout_that_cannot_be_names_the_culprit(refusal, tmp_path, kind, change, expected):
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
def test_annotations_that_cannot_be(refusal, tmp_path, annotations, expected):
    path = annotated(tmp_path, ".zip", annotations)
    message = refusal(load, "image_folder", str(path), test_split="val")
    assert all(part in message for part in expected), message


def test_many_splits_are_not_all_listed(refusal, tmp_path):
    files = {f"class{i:03}/x/1.png": encode(pixels(0)) for i in range(40)}
    message = refusal(load, "image_folder", str(write_directory(tmp_path, files)))
    assert "class009, ..." in message and "class010" not in message


@pytest.mark.parametrize("name", ["train/cat/n.png", "test/eel"])
def test_a_link_to_nothing_is_named(tmp_path, name):
    root = write_directory(tmp_path / "animals", FILES)
    (root / "train" / "dog" / "c.png").symlink_to(root / "train" / "dog" / "b.png")
    (root / "elsewhere").symlink_to(tmp_path / "gone")  # no image is missing here
    assert len(load("image_folder", str(root)).train.labels) == 5
    (root / name).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{name} is a link to what is not there"):
        load("image_folder", str(root))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_an_archive_in_a_bucket(bucket, suffix, tmp_path):
    here = write_archive(tmp_path / f"set{suffix}", FILES)
    (bucket / f"set{suffix}").write_bytes(here.read_bytes())
    found, expected = (load("image_folder", str(path)) for path in (bucket / f"set{suffix}", here))
    assert found.name == "set" and found.class_names == expected.class_names
    np.testing.assert_array_equal(found.train.images, expected.train.images)


def test_a_directory_in_a_bucket(bucket, refusal):
    (bucket / "train/cat/0.png").write_bytes(b"x")
    assert "is no archive (.tar.gz, .tgz, .tar, .zip): images in a bucket are not read file" in (
        refusal(load, "image_folder", str(bucket))
    )
    assert "does not exist" in refusal(load, "image_folder", str(bucket / "no.zip"))
    assert "hdfs:// is not supported" in refusal(load, "image_folder", "hdfs://x/y.zip")
