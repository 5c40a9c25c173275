"""Images sorted into folders, or into an archive of folders, which is read without unpacking it."""

import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from advmoe_jax import storage
from advmoe_jax.data import decoding
from advmoe_jax.data.decoding import Encoded, check_size
from advmoe_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
ANNOTATIONS = "_annotations.txt"
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")

# split -> class -> name of an image -> its content, or the file that holds it
_Tree = dict[str, dict[str, dict[str, bytes | Path]]]
# split -> its annotations: lines of a file's name, a tab, its class, and whatever follows
_Annotations = dict[str, bytes]


class Splits(NamedTuple):
    """What a directory or an archive of images holds.

    Attributes:
        location: the directory or the archive.
        name: of the data set.
        class_names: in order.
        images: of every split, class by class, each class by name; an image is named
            ``<location>: <file>``.
        skipped: how many files lie among the images that are none.
    """

    location: Path
    name: str
    class_names: tuple[str, ...]
    images: dict[str, list[Encoded]]
    skipped: int


class Folder(NamedTuple):
    """Two splits of a directory or an archive of images; see ``Splits``."""

    name: str
    class_names: tuple[str, ...]
    train: list[Encoded]
    test: list[Encoded]
    skipped: int


def read_folder(path: str, train_split: str, test_split: str) -> Folder:
    """The images of two splits; see ``sources.load``.

    Raises:
        UserError: if the images are missing or damaged, or not sorted into classes.
    """
    found = read_splits(path, (train_split, test_split))
    images = (found.images[split] for split in (train_split, test_split))
    return Folder(found.name, found.class_names, *images, found.skipped)


def read_splits(path: str, wanted: Sequence[str], optional: Sequence[str] = ()) -> Splits:
    """The images of several splits; those of a directory stay in their files.

    Args:
        path: of a directory or an archive, see ``sources.load``.
        wanted: names of splits; the classes are those of the first.
        optional: splits that are left out where they are missing, or have images without classes.

    Raises:
        UserError: if the images are missing or damaged, or not sorted into classes.
    """
    if not path:
        raise UserError(
            "image_folder needs a path: a directory <split>/<class>/*.png, or an archive of it"
        )
    location = storage.path_of(path)
    suffix = next((s for s in ARCHIVE_SUFFIXES if location.name.lower().endswith(s)), "")
    named = (*wanted, *optional)
    if storage.is_remote(location):
        if not suffix:
            raise UserError(
                f"{location} is no archive ({', '.join(ARCHIVE_SUFFIXES)}): images in a bucket are"
                " not read file by file; pack them into one, or prepare them, see docs/data.md"
            )
        location = storage.local_copy(location)
    if location.is_dir():
        name, (tree, annotations, skipped) = location.name, _read_directory(location, named)
    elif not location.exists():
        raise UserError(f"{location} does not exist: give the directory or the archive of images")
    elif not suffix:
        raise UserError(
            f"{location} is neither a directory nor an archive ({', '.join(ARCHIVE_SUFFIXES)})"
        )
    else:
        name = location.name[: -len(suffix)]
        tree, annotations, skipped = _read_archive(location, suffix, named)

    for split in set(named) & tree.keys():
        if split in annotations and set(tree[split]) == {"images"}:
            tree[split] = _by_class(location, split, tree[split]["images"], annotations[split])
    unlabelled = {split for split in optional if tree.get(split, {}).keys() <= {"images"}}
    named = tuple(dict.fromkeys(split for split in named if split not in unlabelled))
    for split in named:
        _check_classes(location, tree, split)
    class_names = tuple(sorted(tree[named[0]]))
    for split in named[1:]:
        if unknown := sorted(set(tree[split]) - set(class_names)):
            raise UserError(
                f"{split}/{unknown[0]} in {location} is a class that {named[0]!r} lacks: all"
                " splits must use the same class directories"
            )
    images = {
        split: [
            Encoded(f"{location}: {image}", label, tree[split][class_name][image])
            for label, class_name in enumerate(class_names)
            for image in sorted(tree[split].get(class_name, ()))
        ]
        for split in named
    }
    return Splits(location, name, class_names, images, skipped)


def _check_classes(location: Path, tree: _Tree, split: str) -> None:
    """Raises UserError unless there is such a split, and it has images sorted into classes."""
    if split not in tree:
        raise no_such_split(split, tree, str(location))
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


def _is_there(path: Path) -> bool:
    """Whether there is a file or a directory; a link to neither is an image that was lost."""
    if path.is_file() or path.is_dir():
        return True
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a link to what is not there: mend the link or remove it")
    return False


def _read_directory(root: Path, wanted: Sequence[str]) -> tuple[_Tree, _Annotations, int]:
    def subdirectories(directory: Path) -> dict[str, Path]:
        return {d.name: d for d in directory.iterdir() if d.is_dir() and not _is_hidden(d.name)}

    splits = subdirectories(root)
    if len(splits) == 1 and not set(splits) & set(wanted):
        splits = subdirectories(*splits.values())
    tree: _Tree = {split: {} for split in splits}
    skipped = 0
    for split in set(splits) & set(wanted):
        for entry in splits[split].iterdir():
            _is_there(entry)
        for class_name, directory in subdirectories(splits[split]).items():
            files = list(_files_in(directory))
            images = [file for file in files if _is_image(file.name) and _is_there(file)]
            tree[split][class_name] = {file.relative_to(root).as_posix(): file for file in images}
            skipped += len(files) - len(images)
    annotations = {
        split: file.read_bytes()
        for split in set(splits) & set(wanted)
        if (file := splits[split] / f"{split}{ANNOTATIONS}").is_file()
        and file.stat().st_size <= decoding.MAX_FILE_BYTES
    }
    return tree, annotations, skipped


def _files_in(directory: Path) -> Iterator[Path]:
    """All files below a directory, but for hidden ones."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend or remove it")

    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in folders:
            if Path(folder, name).is_symlink():
                raise UserError(
                    f"{Path(folder, name)} is a link to a directory: put the directory there"
                )
        yield from (Path(folder, name) for name in names if not _is_hidden(name))


def _read_archive(
    location: Path, suffix: str, wanted: Sequence[str]
) -> tuple[_Tree, _Annotations, int]:
    # None stands for a directory, and for an image of a split that is not wanted.
    entries: dict[tuple[str, ...], bytes | None] = {}
    annotations: _Annotations = {}
    total = skipped = 0
    members = _zip_members(location) if suffix == ".zip" else _tar_members(location, suffix)
    try:
        for name, size, open_member in members:
            parts = PurePosixPath(name).parts
            if not parts or parts[0] == "/" or any(_is_hidden(part) for part in parts):
                continue
            if size == _LINK:
                skipped += len(parts) >= 3 and bool(set(wanted) & set(parts[:2]))
            elif open_member is None:
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
            elif len(parts) >= 3 and set(wanted) & set(parts[:2]):
                skipped += 1
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        IndexError,
        OSError,
        RuntimeError,
    ) as error:
        # zipfile's words: IndexError for a member without a name, RuntimeError for encryption and
        # for a compression that it does not know.
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
    return tree, annotations, skipped


# Name and size of each member, and how to open it: None for a directory. A link, which is not
# followed, has no size (``_LINK``); devices are no members.
_LINK = -1
_Members = Iterator[tuple[str, int, Callable[[], Any] | None]]


def _tar_members(location: Path, suffix: str) -> _Members:
    with tarfile.open(location, "r:" if suffix == ".tar" else "r:gz") as archive:
        for member in archive:
            if member.size < 0 or member.issparse():  # endless, or larger than what it is made of
                raise tarfile.ReadError(f"{member.name!a} has no plain size")
            if member.isdir():
                yield member.name, 0, None
            elif member.islnk() or member.issym():
                yield member.name, _LINK, None
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
            elif stat.S_ISLNK(member.external_attr >> 16):
                yield member.filename, _LINK, None
            else:
                yield member.filename, member.file_size, partial(archive.open, member)


def no_such_split(split: str, existing: Iterable[str], where: str) -> UserError:
    """What is to be raised where a data set lacks a split."""
    names = sorted(existing)
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return UserError(
        f"{where} has no split {split!r}: name one of those it has: {listed or 'none'}"
    )
