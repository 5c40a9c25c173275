"""A state file that a killed evaluation can go on from: written whole or not at all."""

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


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


def save(path: str | Path, arrays: dict[str, np.ndarray], owner: str) -> None:
    """Writes the arrays as npz, with the fingerprint of what they belong to; see ``write``."""
    write(path, {"owner": np.array(owner), **arrays})


def write(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays as npz, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: str | Path, owner: str) -> dict[str, np.ndarray] | None:
    """The arrays saved there for the same owner; None if there is no such file.

    Raises:
        ValueError: if the file is damaged, or of another evaluation.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        theirs = str(arrays.pop("owner"))
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"state file {path} is damaged ({type(error).__name__}): "
            "delete it to start again, or give another"
        ) from None
    if theirs != owner:
        raise ValueError(
            f"state file {path} is of another evaluation (other images, labels, key, attacks or "
            "batch size): delete it to start again, or give another"
        )
    return arrays
