"""Files that are whole or not there: JSON, npz and bytes, and states that work goes on from.

A file takes its place when it is written, so that a kill or a full disk leaves what was there
before; ``storage`` knows how, on this machine and in a bucket. Nothing that is read here is ever
executed.
"""

import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from advmoe_jax import storage
from advmoe_jax.errors import UserError

# At most this share of the time of some work goes to saving its state.
_SAVING_SHARE = 1 / 20


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all; makes its directory."""
    with _written(path) as file:
        file.write(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Writes a text in UTF-8, whole or not at all; names of files that are none are escaped."""
    return write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Writes a JSON object, whole or not at all."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds, or None if there is no file.

    Raises:
        UserError: if the file is damaged, or is no file.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise UserError(f"{path} is no file; move it away and give the command again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError
    except (ValueError, RecursionError):  # the latter where it is nested too deeply
        raise UserError(f"{path} is damaged; move it away and give the command again") from None
    return content


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file with one a line, and how many lines are damaged.

    A kill may tear the last line. Lines of other JSON are left out and are not counted; a file that
    does not exist has no lines.

    Raises:
        UserError: if there is something else than a file.
    """
    objects, damaged = [], 0
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file; move it away and give the command again")
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    for line in filter(str.strip, text.splitlines()):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if isinstance(content, dict):
            objects.append(content)
    return objects, damaged


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes arrays as npz, whole or not at all."""
    with _written(path) as file:
        np.savez(file, **arrays)
    return path


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz that was written by ``write_npz``, possibly by a stranger.

    Its parts must not be compressed, so that no more is read than the file is long; pickled objects
    are refused, and so are arrays of another size than they say.

    Raises:
        UserError: if there is no such file, or it is damaged.
    """
    try:
        size = storage.size(path)
        with _read(path) as content, zipfile.ZipFile(content) as file:
            parts = file.infolist()
            is_plain = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            if not is_plain or sum(part.file_size for part in parts) > size:
                raise ValueError
            return {part.filename.removesuffix(".npy"): _array(file.read(part)) for part in parts}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {storage.reason(error)}") from None
    except (ValueError, TypeError, SyntaxError, EOFError, RuntimeError, zipfile.BadZipFile):
        raise UserError(f"{path} is damaged, or no npz of this package") from None


def _array(content: bytes) -> np.ndarray:
    """The array of an npy file; ValueError if it is none."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    values = content[file.tell() :]
    if dtype.hasobject or dtype.kind not in "biufU" or any(n < 0 for n in shape):
        raise ValueError
    if len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError
    array = np.frombuffer(values, dtype) if values else np.empty(0, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C")


def fingerprint(parts: Iterable[object]) -> str:
    """A digest of arrays (dtype, shape and content) and of other things' ``repr``."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


class StateFile:
    """Where work that may be killed keeps its state, and goes on from.

    Args:
        path: of the file, an npz; None: nothing is kept.
        owner: fingerprint of the work; a state of other work is refused.
        writes: False in a process that reads alone, since another one writes.
    """

    def __init__(self, path: str | Path | None, owner: str, *, writes: bool = True) -> None:
        self.path, self.owner = None if path is None else storage.path_of(path), owner
        self._writes = writes
        self._saved_at = self._took = 0.0

    def load(self) -> dict[str, np.ndarray] | None:
        """The arrays that were saved; None if there are none.

        Raises:
            ValueError: if the file is damaged, or of other work.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            with _read(self.path) as content, np.load(content, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            theirs = str(arrays.pop("owner"))
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as e:
            raise ValueError(
                f"state file {self.path} is damaged ({type(e).__name__}): "
                "delete it to start again, or give another"
            ) from None
        if theirs != self.owner:
            raise ValueError(
                f"state file {self.path} is of another evaluation (other images, labels, key, "
                "attacks or batch size): delete it to start again, or give another"
            )
        return arrays

    @property
    def is_due(self) -> bool:
        """Whether it is time to save again: a large state is saved less often."""
        now = time.perf_counter()
        return self.path is not None and now - self._saved_at > self._took / _SAVING_SHARE

    def save(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the state, whole or not at all."""
        if self.path is None or not self._writes:
            return
        began = time.perf_counter()
        write_npz(self.path, {"owner": np.array(self.owner), **arrays})
        self._saved_at = time.perf_counter()
        self._took = self._saved_at - began


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place when the context ends without an error."""
    with storage.taking_place(path) as partial, open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> BinaryIO:
    """The file, to be read from; an object is read whole first, since parts take a request each."""
    return io.BytesIO(storage.content(path)) if storage.is_remote(path) else path.open("rb")
