"""From encoded images to arrays: PNG and JPEG, decoded in threads, their sizes never trusted."""

import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advmoe_jax.errors import UserError
from advmoe_jax.memory import check_fits

if TYPE_CHECKING:
    from PIL import Image

# What one encoded image may weigh, and what a source's encoded or decoded images may weigh
# together: beyond them a file is not a photograph, and a data set does not belong in memory.
MAX_FILE_BYTES = 64 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30
# What one image may have, as it is or resized; 8192x8192.
MAX_PIXELS = 2**26


class Encoded(NamedTuple):
    """One image before decoding: ``name`` is what an error calls it."""

    name: str
    label: int
    content: bytes | Path


class EncodedImages:
    """Images uint8 [N, H, W, C] that are decoded when they are read, not before.

    Indexing selects, and decodes nothing; ``np.asarray`` decodes what was selected.
    """

    def __init__(
        self, items: Sequence[Encoded], image_shape: tuple[int, int, int], image_size: int
    ) -> None:
        self._items, self._image_shape, self._image_size = items, image_shape, image_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        return (len(self._items), *self._image_shape)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, indices: np.ndarray) -> "EncodedImages":
        chosen = [self._items[i] for i in indices]
        return EncodedImages(chosen, self._image_shape, self._image_size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = decode(self._items, self._image_size, self._image_shape)
        return images if dtype is None else images.astype(dtype)


def decode(
    items: Sequence[Encoded], image_size: int, image_shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Decodes images in threads (PIL releases the GIL): uint8 [len(items), H, W, 1 or 3].

    Args:
        items: the images.
        image_size: see ``to_array``.
        image_shape: (H, W, C) that they must have; None: the first one's size, and one channel if
            every image is grey.

    Raises:
        UserError: if an image cannot be decoded or has another size, or all are too large.
    """
    if image_size:
        check_total(len(items), image_size, image_size)
    height, width = (image_shape or _decode_one(items[0], image_size).shape)[:2]
    check_total(len(items), height, width)
    images = np.empty((len(items), height, width, 3), np.uint8)

    def fill(index: int) -> int:
        image = _decode_one(items[index], image_size)
        if image.shape[:2] != (height, width):
            raise UserError(
                f"{items[index].name} is {image.shape[1]}x{image.shape[0]}, the images before it"
                f" are {width}x{height}: set image_size to bring them to one size"
            )
        images[index] = image  # a grey image fills all three channels
        return image.shape[-1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        channels = list(pool.map(fill, range(len(items))))
    wanted = image_shape[2] if image_shape else max(channels)
    if max(channels) > wanted:
        name = items[channels.index(3)].name
        raise UserError(f"{name} is in colour, but the test images are grey: set data.stream=False")
    return images if wanted == 3 else images[..., :1].copy()


def _decode_one(item: Encoded, image_size: int) -> np.ndarray:
    from PIL import Image

    try:
        content = item.content
        if isinstance(content, Path):
            check_size(item.name, content.stat().st_size, total=0)
            content = content.read_bytes()
        with _opened(content) as image:
            _check_pixels(item.name, *image.size)
            return to_array(image, image_size)
    except (UserError, MemoryError):  # the latter is not the image's fault
        raise
    except Image.DecompressionBombError:
        raise UserError(
            f"{item.name} has more than the {MAX_PIXELS:,} pixels allowed: shrink or remove it"
        ) from None
    except Exception as error:  # damaged bytes make PIL raise almost anything
        raise UserError(
            f"{item.name} cannot be decoded as an 8-bit JPEG or PNG: restore or remove it"
        ) from error


def _opened(content: bytes) -> "Image.Image":
    """The image, of which nothing but the header is read; Pillow's own advice stays unsaid."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} is {width}x{height}: an image may have {MAX_PIXELS:,} pixels; shrink or "
            "remove it"
        )


def check_total(count: int, height: int, width: int) -> None:
    """Raises UserError if so many decoded images have more bytes than they may, or than there are.

    Args:
        count: number of images.
        height: of each.
        width: of each.
    """
    _check_pixels("image_size", width, height)
    size = count * height * width * 3
    what = f"{count:,} images of {width}x{height}"
    if size > MAX_TOTAL_BYTES:
        raise UserError(
            f"{what} need {size} bytes, more than the {MAX_TOTAL_BYTES} allowed: set a smaller "
            "image_size"
        )
    check_fits(what, size, "set a smaller image_size")


def to_array(image: "Image.Image", image_size: int) -> np.ndarray:
    """A PIL image as uint8 [H, W, 1 or 3], cut to a square of image_size unless that is 0."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{image.mode} has more than 8 bits, which convert() would clip")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if image_size:
        # One step from the centre square, so that no long thin image is ever blown up whole.
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        image = image.resize(
            (image_size, image_size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + side, top + side),
        )
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def check_size(name: str, size: int, total: int) -> None:
    """Raises UserError if an encoded image, or all up to it, have more bytes than they may."""
    if size > MAX_FILE_BYTES:
        raise UserError(
            f"{name} has {size} bytes: an image may have {MAX_FILE_BYTES}; shrink or remove it"
        )
    if total > MAX_TOTAL_BYTES:
        raise UserError(
            f"{name}: the images up to here have {total} bytes, more than the {MAX_TOTAL_BYTES}"
            " that may be read into memory: use fewer or smaller images"
        )
