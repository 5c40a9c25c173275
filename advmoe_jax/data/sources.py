"""What images exist: each source becomes the same two arrays, read once into host memory.

Nothing here knows JAX or the network; `pipeline` carries the arrays to the device.
"""

import difflib
import json
import os
import shlex
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from advmoe_jax.data import decoding
from advmoe_jax.data.decoding import Encoded, EncodedImages, check_size, to_array
from advmoe_jax.errors import UserError

SOURCES = ("digits", "image_folder", "tfds:<name>")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "_annotations.txt"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")


class Split(NamedTuple):
    """Images and their classes.

    images: uint8 [N, H, W, C], C is 1 or 3, or the same still encoded; labels: int32 [N] in
    [0, number of classes).
    """

    images: np.ndarray | EncodedImages
    labels: np.ndarray


class Dataset(NamedTuple):
    """A classification data set; `class_names[label]` is a label's name."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]


# split -> class -> name of an image -> its content, or the file that holds it
_Tree = dict[str, dict[str, dict[str, bytes | Path]]]
# split -> its annotations: lines of a file's name, a tab, its class, and whatever follows
_Annotations = dict[str, bytes]


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
        source: `digits` (scikit-learn's 1,797 digits, 8x8x1; a fixed 20% are the test set);
            `image_folder` (PNG and JPEG files `<path>/<split>/<class>/**`, classes sorted by name;
            or, as Tiny-ImageNet has its validation split, `<split>/images/*` with the class of each
            file in `<split>/<split>_annotations.txt`);
            `tfds:<name>` (a data set prepared by TensorFlow Datasets, read without TensorFlow).
        path: for `image_folder` the directory, or an archive of it (.tar.gz, .tgz, .tar, .zip: read
            in memory, nothing is unpacked), either with at most one directory around the splits;
            for `tfds` its data_dir, empty for the default; not used by `digits`.
        image_size: 0 keeps the native size, which all images must then share; otherwise the shorter
            side is resized to it (bilinear) and the centre is kept.
        train_split: the split to train on.
        test_split: the split to measure on.
        stream: leave the training images encoded (in their files, if `path` is a directory) until
            they are read; not for `digits`.

    Returns:
        The two splits; images have one channel if every image of both is grey, else three. Streamed
        images have as many as the test images.

    Raises:
        UserError: an unknown source or split, missing or damaged data, images of different sizes
            with `image_size=0`, more than 64 MiB in one file or 64 GiB in all.
    """
    if image_size < 0:
        raise UserError(f"image_size is {image_size}: give 0 for the native size, or pixels")
    if source == "digits":
        return _digits(image_size, train_split, test_split)
    if source == "image_folder":
        name, class_names, train, test = _image_folder(path, train_split, test_split)
    elif source.startswith("tfds:") and source != "tfds:":
        name = source.removeprefix("tfds:")
        class_names, train, test = _prepared(name, path, train_split, test_split)
    else:
        near = difflib.get_close_matches(source, SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown data source {source!r}: {hint}it is one of {', '.join(SOURCES)}")
    labels = np.array([item.label for item in [*train, *test]], np.int32)
    cut = len(train)
    if stream:
        of_test = decoding.decode(test, image_size)
        of_train = EncodedImages(train, of_test.shape[1:], image_size)
    else:
        images = decoding.decode([*train, *test], image_size)
        of_train, of_test = images[:cut], images[cut:]
    return Dataset(name, Split(of_train, labels[:cut]), Split(of_test, labels[cut:]), class_names)


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


def _digits(image_size: int, train_split: str, test_split: str) -> Dataset:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if image_size:
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
            raise _no_split(split, splits, "digits")
    names = tuple(str(name) for name in digits.target_names)
    return Dataset("digits", splits[train_split], splits[test_split], names)


def _no_split(split: str, existing: Iterable[str], where: str) -> UserError:
    names = sorted(existing)
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return UserError(
        f"{where} has no split {split!r}: name one of those it has: {listed or 'none'}"
    )


# ------------------------------------------------------------------------------ image folders


def _image_folder(
    path: str, train_split: str, test_split: str
) -> tuple[str, tuple[str, ...], list[Encoded], list[Encoded]]:
    if not path:
        raise UserError(
            "image_folder needs a path: a directory <split>/<class>/*.png, or an archive of it"
        )
    location = Path(path).expanduser()
    suffix = next((s for s in ARCHIVE_SUFFIXES if location.name.lower().endswith(s)), "")
    wanted = (train_split, test_split)
    if location.is_dir():
        name, (tree, annotations) = location.name, _read_directory(location, wanted)
    elif not location.exists():
        raise UserError(f"{location} does not exist: give the directory or the archive of images")
    elif not suffix:
        raise UserError(
            f"{location} is neither a directory nor an archive ({', '.join(ARCHIVE_SUFFIXES)})"
        )
    else:
        name = location.name[: -len(suffix)]
        tree, annotations = _read_archive(location, suffix, wanted)

    for split in wanted:
        if split not in tree:
            raise _no_split(split, tree, str(location))
        if split in annotations and set(tree[split]) == {"images"}:
            tree[split] = _by_class(location, split, tree[split]["images"], annotations[split])
        if not tree[split]:
            raise UserError(
                f"split {split!r} of {location} has no class directories: images belong in"
                f" {split}/<class>/"
            )
        for class_name, images in tree[split].items():
            if not images:
                raise UserError(
                    f"{split}/{class_name} in {location} holds no images"
                    f" ({', '.join(IMAGE_SUFFIXES)}): add some or remove it"
                )
    class_names = tuple(sorted(tree[train_split]))
    unknown = sorted(set(tree[test_split]) - set(class_names))
    if unknown:
        raise UserError(
            f"{test_split}/{unknown[0]} in {location} is a class that {train_split!r} lacks: both"
            " splits must use the same class directories"
        )
    train, test = (
        [
            Encoded(f"{location}: {image}", label, tree[split][class_name][image])
            for label, class_name in enumerate(class_names)
            for image in sorted(tree[split].get(class_name, ()))
        ]
        for split in wanted
    )
    return name, class_names, train, test


def _by_class(
    location: Path, split: str, images: dict[str, bytes | Path], annotations: bytes
) -> dict[str, dict[str, bytes | Path]]:
    """The images of a split sorted into the classes that its annotations say."""
    where = f"{split}/{split}{ANNOTATIONS} in {location}"
    class_of = {}
    for line in annotations.decode(errors="replace").splitlines():
        if line.strip():
            file, tab, rest = line.partition("\t")
            class_of[file] = rest.split("\t")[0].strip()
            if not tab or not class_of[file]:
                raise UserError(f"{where}: {line[:60]!a} is no file name, tab and class")
    sorted_images: dict[str, dict[str, bytes | Path]] = {}
    for image, content in images.items():
        class_name = class_of.get(image.rsplit("/", 1)[-1])
        if class_name is None:
            raise UserError(f"{where} says nothing of {image}: add its class or remove the image")
        sorted_images.setdefault(class_name, {})[image] = content
    return sorted_images


def _is_hidden(part: str) -> bool:
    # "..", and what macOS leaves in archives, are no split, class or image.
    return part.startswith(".") or part == "__MACOSX"


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _read_directory(root: Path, wanted: Sequence[str]) -> tuple[_Tree, _Annotations]:
    def subdirectories(directory: Path) -> dict[str, Path]:
        return {d.name: d for d in directory.iterdir() if d.is_dir() and not _is_hidden(d.name)}

    splits = subdirectories(root)
    if len(splits) == 1 and not set(splits) & set(wanted):
        splits = subdirectories(*splits.values())
    tree: _Tree = {split: {} for split in splits}
    for split in set(splits) & set(wanted):
        for class_name, directory in subdirectories(splits[split]).items():
            tree[split][class_name] = {
                file.relative_to(root).as_posix(): file
                for folder, _, names in os.walk(directory)
                for file in (Path(folder, name) for name in names if not _is_hidden(name))
                if _is_image(file.name) and file.is_file()
            }
    annotations = {
        split: file.read_bytes()
        for split in set(splits) & set(wanted)
        if (file := splits[split] / f"{split}{ANNOTATIONS}").is_file()
        and file.stat().st_size <= decoding.MAX_FILE_BYTES
    }
    return tree, annotations


def _read_archive(location: Path, suffix: str, wanted: Sequence[str]) -> tuple[_Tree, _Annotations]:
    # None stands for a directory, and for an image of a split that is not wanted.
    entries: dict[tuple[str, ...], bytes | None] = {}
    annotations: _Annotations = {}
    total = 0
    members = _zip_members(location) if suffix == ".zip" else _tar_members(location, suffix)
    try:
        for name, size, open_member in members:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or any(_is_hidden(part) for part in parts):
                continue
            if open_member is None:
                entries[parts] = None
            elif parts[-1].endswith(ANNOTATIONS) and parts[-2:-1]:
                split = parts[-2]
                if split in wanted and parts[-1] == f"{split}{ANNOTATIONS}" and len(parts) <= 3:
                    check_size(f"{location}: {name}", size, total)
                    with open_member() as stream:
                        annotations[split] = stream.read(size)
            elif _is_image(name) and len(parts) >= 3:
                entries[parts] = None
                if set(wanted) & set(parts[:2]):
                    total += size
                    check_size(f"{location}: {name}", size, total)
                    with open_member() as stream:
                        entries[parts] = stream.read(size)
                    if len(entries[parts]) < size:
                        raise EOFError(f"{name} is cut short")
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        RuntimeError,
    ) as error:
        # RuntimeError is zipfile's word for encryption and for a compression that it does not know.
        raise UserError(
            f"{location} is not a readable {suffix} archive, or is cut short ({error}): fetch it"
            " again"
        ) from error

    tops = {parts[0] for parts in entries}
    depth = 1 if len(tops) == 1 and not tops & set(wanted) else 0
    tree: _Tree = {}
    for parts, content in entries.items():
        split, class_name = (*parts[depth : depth + 2], None, None)[:2]
        if split is not None:
            classes = tree.setdefault(split, {})
            if class_name is not None:
                images = classes.setdefault(class_name, {})
                if content is not None and len(parts) >= depth + 3:
                    images["/".join(parts)] = content
    return tree, annotations


# Name and size of each member, and how to open it: None for a directory. No links, no devices.
_Members = Iterator[tuple[str, int, Callable[[], Any] | None]]


def _tar_members(location: Path, suffix: str) -> _Members:
    with tarfile.open(location, "r:" if suffix == ".tar" else "r:gz") as archive:
        for member in archive:
            if member.isdir():
                yield member.name, 0, None
            elif member.isreg():
                yield member.name, member.size, partial(archive.extractfile, member)
        # tarfile takes a cut or damaged header for the archive's end; a real end is nothing but
        # zeros. Reading it also makes gzip compare its checksum.
        if archive.fileobj.tell() < archive.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")
        while rest := archive.fileobj.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header at byte {archive.offset}")


def _zip_members(location: Path) -> _Members:
    with zipfile.ZipFile(location) as archive:
        for member in archive.infolist():
            if member.is_dir():
                yield member.filename, 0, None
            elif not stat.S_ISLNK(member.external_attr >> 16):
                yield member.filename, member.file_size, partial(archive.open, member)


# ------------------------------------------------------------------------- TensorFlow Datasets


def _prepared(
    name: str, data_dir: str, train_split: str, test_split: str
) -> tuple[tuple[str, ...], list[Encoded], list[Encoded]]:
    import tensorflow_datasets as tfds

    # Not tfds.builder nor tfds.data_source: both ask the network about what is not prepared.
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    if data_dir:
        data_dir = str(Path(data_dir).expanduser())
    # Preparing needs what reading does not. The command avoids `tfds build`, which asks for Apache
    # Beam; importlib_resources is missing from tfds' own requirements.
    arguments = [json.dumps(name), *([f"data_dir={json.dumps(data_dir)}"] if data_dir else [])]
    program = (
        "import tensorflow_datasets as tfds;"
        f' tfds.builder({", ".join(arguments)}, file_format="array_record").download_and_prepare()'
    )
    prepare = (
        f"pip install tensorflow importlib_resources && {shlex.join(['python', '-c', program])}"
    )
    try:
        builder = builder_from_files(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"tfds:{name} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}: prepare it"
            f" once with `{prepare}`"
        ) from error
    except Exception as error:  # a damaged or ambiguous directory raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"tfds:{name} cannot be opened: {reason}; mend that, or prepare it in another data_dir"
        ) from error

    features = dict(builder.info.features.items())
    keys = builder.info.supervised_keys or ("image", "label")
    image, label = (features.get(key) for key in keys[:2])
    if not (
        isinstance(image, tfds.features.Image)
        and image.np_dtype == np.uint8  # .dtype would import TensorFlow
        and isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(f"tfds:{name} is not a set of 8-bit images with one class label each")

    def read(split: str) -> list[Encoded]:
        try:
            # The images stay encoded, so that threads decode them and damage has a name.
            records = builder.as_data_source(split, decoders={keys[0]: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(
                f"tfds:{name} in {builder.data_dir} is not in the array_record format: remove it or"
                f" give another path, then prepare it with `{prepare}`"
            ) from error
        except ValueError as error:
            raise _no_split(split, builder.info.splits, f"tfds:{name}") from error
        try:
            items = [
                Encoded(f"{builder.data_dir}: {split}[{i}]", record[keys[1]], record[keys[0]])
                for i, record in enumerate(records)
            ]
        except Exception as error:  # array_record's C++ part and protobuf raise many kinds
            raise UserError(
                f"split {split!r} of tfds:{name} in {builder.data_dir} cannot be read: remove that"
                f" directory, then prepare it with `{prepare}`"
            ) from error
        if not items:
            raise UserError(f"split {split!r} of tfds:{name} is empty: name another")
        if min(item.label for item in items) < 0:
            raise UserError(f"split {split!r} of tfds:{name} has no labels: name another")
        return items

    return tuple(label.names), read(train_split), read(test_split)
