"""Where files lie: on this machine, or as objects in a bucket (``gs://``, ``s3://``).

A path on this machine is a ``pathlib.Path``. One in a bucket is an ``epath.Path``, which reads,
lists and joins by the same methods; what the two do differently is decided here. An object is
written whole or not at all, and at once; it can be neither renamed, appended to nor locked, and
there are no directories but in the names of objects.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advmoe_jax.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# By scheme: fsspec's name of the file system, the library that it needs, and our extra with it.
_KINDS = {"gs": ("gcs", "gcsfs", "gcs"), "s3": ("s3", "s3fs", "s3")}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Whose errors tell of a bucket that cannot be reached; not all are OSErrors.
_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google.auth", "s3fs")
# In a directory of objects: all of it has been written.
_WHOLE = "whole"


def path_of(text: str | os.PathLike[str]) -> Path:
    """The path that a user wrote, in a bucket if it begins with ``gs://`` or ``s3://``.

    Raises:
        UserError: if it is of another kind of storage, names no bucket, or the library that
            reaches the bucket is not installed.
    """
    found = _SCHEME.match(os.fspath(text))
    if found is None:
        return _at_home(text)
    scheme, rest = found[1].lower(), found[2]
    if scheme not in _KINDS:
        raise UserError(
            f"{text} is no directory of this machine, and {scheme}:// is not supported: use a "
            "local directory, gs:// or s3://"
        )
    if not rest.strip("/"):
        raise UserError(f"{text} names no bucket: write {scheme}://bucket/directory")
    import fsspec
    from etils import epath

    protocol, library, extra = _KINDS[scheme]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        raise UserError(
            f"{text} is reached by {library}, which is not installed: run "
            f"`pip install 'advmoe_jax[{extra}]'`, or, in a checkout, `pip install -e '.[{extra}]'`"
        ) from None
    # Other processes write there, too: what was listed before may be out of date.
    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    # One way to the bucket, whether or not TensorFlow is installed, whose errors are others.
    os.environ["EPATH_USE_TF"] = "false"
    return epath.Path(f"{scheme}://{rest}")


def is_remote(path: Path) -> bool:
    """Whether a path lies in a bucket."""
    return not isinstance(path, Path)


def local_path(text: str | os.PathLike[str], flag: str) -> Path:
    """The path that a user wrote, which must be on this machine.

    Raises:
        UserError: if it is in a bucket.
    """
    if _SCHEME.match(os.fspath(text)):
        raise UserError(f"--{flag}={text} must be on this machine: copy it here first")
    return _at_home(text)


def _at_home(text: str | Path) -> Path:
    """The path, with ``~`` as the directory that it stands for."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user here, whose directory ~ could be") from None


def size(path: Path) -> int:
    """Bytes of a file."""
    return _file_system(path).size(str(path)) if is_remote(path) else path.stat().st_size


def content(path: Path) -> bytes:
    """A file, read whole.

    Raises:
        FileNotFoundError: if there is none.
        UserError: if the bucket cannot be reached.
    """
    with _explained(path, "read"):
        return path.read_bytes()


def put(file: Path, target: Path) -> None:
    """Copies a file of this machine to a bucket, whole or not at all.

    Raises:
        UserError: if the bucket does not exist, cannot be reached, or must not be written to.
    """
    with _explained(target, "written"):
        _file_system(target).put_file(str(file), str(target))


def get(source: Path, file: Path) -> None:
    """Copies an object to this machine.

    Raises:
        FileNotFoundError: if there is no such object.
        UserError: if the bucket cannot be reached.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _explained(source, "read"):
        system = _file_system(source)
        wanted = system.size(str(source))
        system.get_file(str(source), str(file))
        if file.stat().st_size != wanted:
            raise OSError(f"{file.stat().st_size} bytes of {wanted} came")


def files_in(directory: Path) -> dict[str, Any]:
    """What the bucket says of each object below a directory, by its relative path."""
    with _explained(directory, "read"):
        system = _file_system(directory)
        root = system._strip_protocol(str(directory)).rstrip("/") + "/"
        try:
            found = system.find(root, detail=True)
        except FileNotFoundError:
            found = {}
    return {name.removeprefix(root): about for name, about in sorted(found.items())}


def move(source: Path, target: Path) -> None:
    """Moves all objects of a directory to another one in the same bucket."""
    with _explained(source, "moved"):
        for name in files_in(source):
            _file_system(source).cp_file(str(source / name), str(target / name))
    remove_tree(source)


def remove_tree(directory: Path) -> None:
    """Removes a directory with all that it holds, if there is one."""
    if is_remote(directory):
        with _explained(directory, "removed"):
            if files_in(directory):
                _file_system(directory).rm(str(directory), recursive=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def taking_place(path: Path) -> Iterator[Path]:
    """A path on this machine for a file that takes its place when the context ends well.

    A kill or a full disk leaves what was there before. The file's directory is made.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            put(Path(folder) / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


@contextmanager
def taking_place_whole(directory: Path) -> Iterator[Path]:
    """A directory on this machine that takes its place when the context ends well."""
    if is_remote(directory):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            remove_tree(directory)
            for file in sorted(x for x in Path(folder).rglob("*") if x.is_file()):
                put(file, directory / file.relative_to(folder).as_posix())
            (directory / _WHOLE).write_text("")
        return
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.rename(directory)


def is_whole(directory: Path) -> bool:
    """Whether there is a directory that ``taking_place_whole`` has made."""
    return (directory / _WHOLE if is_remote(directory) else directory).exists()


def local_copy(path: Path) -> Path:
    """Of a file or a directory in a bucket, a copy on this machine; others as they are.

    Copies lie in ``$XDG_CACHE_HOME/advmoe_jax`` (``~/.cache/advmoe_jax``). One is used again as
    long as the bucket tells the same names, sizes and versions.

    Raises:
        UserError: if there is nothing, the disk is too small, or the bucket cannot be reached.
    """
    if not is_remote(path):
        return path
    with _explained(path, "read"):
        system = _file_system(path)
        found = {"": system.info(str(path))} if system.isfile(str(path)) else files_in(path)
    if not found:
        raise UserError(f"{path} does not exist, or holds nothing")
    versions = [(name, about["size"], _version(about)) for name, about in found.items()]
    key = hashlib.sha256(json.dumps([str(path), versions]).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "advmoe_jax"
    if not (home / key).exists():
        home.mkdir(parents=True, exist_ok=True)
        _check_free(home, path, sum(about["size"] for about in found.values()))
        _copy_whole(path, found, home / key)
    return home / key / path.name


def _copy_whole(path: Path, names: Any, place: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=place.parent))
    try:
        for name in names:
            get(path / name if name else path, partial / path.name / name)
        os.replace(partial, place)
    except FileNotFoundError:
        raise UserError(f"{path} was changed while it was copied; give the command again") from None
    except OSError:
        if not place.exists():  # where another process was first, its copy is as good
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _version(about: Any) -> str:
    """What tells one content of an object from another, as far as the bucket says."""
    names = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated", "mtime")
    return str([str(about[name]) for name in names if about.get(name)])


def _check_free(home: Path, path: Path, needed: int) -> None:
    free = shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"{path} has {needed:,} bytes and {home} room for {free:,}: free some space, or set "
            "XDG_CACHE_HOME to another disk"
        )


def explanation(error: BaseException) -> str | None:
    """What is wrong with a bucket, in one line; None if the error is of something else."""
    of_a_bucket = f"{type(error).__module__}.".startswith(tuple(f"{x}." for x in _LIBRARIES))
    return f"the storage cannot be reached: {reason(error)}" if of_a_bucket else None


def reason(error: BaseException) -> str:
    """The words of an error in one line: the system's, or the library's."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    is_systems = isinstance(error, OSError) and error.filename is not None
    return (is_systems and error.strerror) or text


@contextmanager
def _explained(path: Path, verb: str) -> Iterator[None]:
    """Turns the errors of a bucket into a UserError that names the path.

    That there is no such object to be read is left as it is.
    """
    try:
        yield
    except Exception as error:
        is_missing = isinstance(error, FileNotFoundError)
        is_known = isinstance(error, OSError) or explanation(error) is not None
        if not is_known or (is_missing and verb == "read"):
            raise
        text = "there is no such bucket" if is_missing else reason(error)
        raise UserError(f"{path} cannot be {verb}: {text}") from error


def _file_system(path: Path) -> "AbstractFileSystem":
    """The one that ``path`` itself uses."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(path)
