"""Extra training images from an ``.npz`` file: generated ones, say (Gowal et al., NeurIPS 2021).

The file comes from strangers: nothing in it is executed, and what its headers say of sizes is
checked before any of it is read.
"""

import lzma
import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from advmoe_jax import storage
from advmoe_jax.data.decoding import MAX_TOTAL_BYTES
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError

_NAMES = ("images", "labels")
_HEADER_BYTES = 2**16
_MOST_INFLATED = 1100  # times; deflate reaches 1,032


def load_extra(path: str, image_shape: tuple[int, int, int], num_classes: int) -> Split:
    """Reads images and labels to be mixed into training batches.

    Args:
        path: of an ``.npz`` with ``images`` uint8 [n, H, W, C] and ``labels``, integers [n] in
            [0, num_classes).
        image_shape: (H, W, C) of the training images.
        num_classes: of the training images.

    Raises:
        UserError: if there is no such file, it is damaged, or an array is missing, or of another
            shape or dtype, or too large.
    """
    file = storage.local_copy(storage.path_of(path))
    try:
        with zipfile.ZipFile(file) as archive:
            images, labels = (_array(file, archive, name) for name in _NAMES)
    except OSError as error:
        raise UserError(f"data.extra_path={path} cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, IndexError, RuntimeError):
        raise UserError(f"data.extra_path={path} is damaged, or no .npz file") from None
    if images.shape[1:] != tuple(image_shape) or len(images) == 0:
        raise UserError(
            f"{file}: images has shape {images.shape}, the training images are {image_shape}: "
            f"give uint8 [n, {', '.join(map(str, image_shape))}]"
        )
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"{file}: labels has shape {labels.shape} for {len(images)} images; give one per image"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{file}: labels lie in {labels.min()}..{labels.max()}; the training images have "
            f"{num_classes} classes, 0..{num_classes - 1}"
        )
    return Split(images, labels.astype(np.int32))


def _array(file: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of the archive, its size and dtype checked before it is read."""
    member = f"{name}.npy"
    if member not in archive.namelist():
        found = ", ".join(n.removesuffix(".npy") for n in archive.namelist()[:5]) or "nothing"
        raise UserError(f"{file} holds no array {name!r}, but {found}; it needs images and labels")
    try:
        with archive.open(member) as stream:
            shape, dtype = _header(stream)
        kinds = {"images": "u", "labels": "iu"}[name]
        if dtype.kind not in kinds or (name == "images" and dtype.itemsize != 1):
            wanted = {"images": "uint8", "labels": "integers"}[name]
            raise UserError(f"{file}: {name} is of dtype {dtype}, it must be {wanted}")
        _check_size(file, archive.getinfo(member), math.prod(shape) * dtype.itemsize)
        with archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:  # of NumPy: a header that is none, too few bytes, pickled objects
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: {name} is damaged: {reason}") from None


def _check_size(file: Path, member: zipfile.ZipInfo, size: int) -> None:
    """Refuses what would need more memory than the file can fill, or more than there should be."""
    plausible = min(MAX_TOTAL_BYTES, _MOST_INFLATED * member.compress_size) + _HEADER_BYTES
    if not size <= member.file_size <= min(size + _HEADER_BYTES, plausible):
        raise UserError(
            f"{file}: {member.filename} should have {size} bytes by its header and "
            f"{member.file_size} by the archive; they must agree, and be at most {MAX_TOTAL_BYTES}"
        )


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = read(stream)
    return shape, dtype
