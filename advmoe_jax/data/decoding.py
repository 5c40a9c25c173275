"""From encoded images to arrays: PNG and JPEG, decoded in threads, their sizes never trusted."""

import io
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

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
    """One image before decoding: ``name`` is what an error calls it.

    ``content`` is the image, or the file that holds it, or what reads it from elsewhere.
    """

    name: str
    label: int
    content: bytes | Path | Callable[[], bytes]


class Crops(NamedTuple):
    """Where rectangles of whole images are cut out, one per image; see ``augment.resized_crop``.

    Attributes:
        draws: float32 [n, 4], uniform in [0, 1): of the area, the ratio of the sides, the row, the
            column.
        least_area: in (0, 1].
    """

    draws: np.ndarray
    least_area: float


def decode(
    items: Sequence[Encoded],
    image_size: int,
    image_shape: tuple[int, int, int] | None = None,
    crops: Crops | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Decodes images in threads (PIL releases the GIL): uint8 [len(items), H, W, 1 or 3].

    Args:
        items: the images.
        image_size: see ``to_array``.
        image_shape: (H, W, C) that they must have; None: the first one's size, and one channel if
            every image is grey.
        crops: rectangles of the whole images that become images of ``image_size``; None: the
            centre.
        threads: how many; None: one for each processor.

    Raises:
        UserError: if an image cannot be decoded or has another size, or all are too large.
    """
    if image_size:
        check_total(len(items), image_size, image_size)
    height, width = (image_shape or decode_one(items[0], image_size).shape)[:2]
    check_total(len(items), height, width)
    images = np.empty((len(items), height, width, 3), np.uint8)

    def fill(index: int) -> int:
        crop = None if crops is None else Crops(crops.draws[index], crops.least_area)
        image = decode_one(items[index], image_size, crop)
        if image.shape[:2] != (height, width):
            raise UserError(
                f"{items[index].name} is {image.shape[1]}x{image.shape[0]}, the images before it"
                f" are {width}x{height}: set image_size to bring them to one size"
            )
        images[index] = image  # a grey image fills all three channels
        return image.shape[-1]

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        channels = list(pool.map(fill, range(len(items))))
    wanted = image_shape[2] if image_shape else max(channels)
    if max(channels) > wanted:
        name = items[channels.index(3)].name
        raise UserError(f"{name} is in colour, but the test images are grey: set data.stream=False")
    return images if wanted == 3 else images[..., :1].copy()


def shape_of(items: Iterable[Encoded], image_size: int) -> tuple[int, int, int]:
    """(height, width, channels) that ``decode`` would give these images.

    Headers are read, up to the first image in colour.

    Raises:
        UserError: if a header cannot be read.
    """
    headers = (_read(item, lambda image: (image.size, _is_grey(image))) for item in items)
    (width, height), is_grey = next(headers)
    if image_size:
        width = height = image_size
    _check_pixels("image_size", width, height)
    return height, width, 1 if is_grey and all(grey for _, grey in headers) else 3


def decode_one(item: Encoded, image_size: int, crop: Crops | None = None) -> np.ndarray:
    """One image, uint8 [H, W, 1 or 3]; ``crop``: its own, with draws [4].

    Raises:
        UserError: if it cannot be decoded, or is too large.
    """
    return _read(item, lambda image: to_array(image, image_size, crop))


def content_of(item: Encoded) -> bytes:
    """The encoded image, wherever it lies.

    Raises:
        UserError: if it is too large.
    """
    with _stream(item) as stream:
        return stream.read()


def _stream(item: Encoded) -> IO[bytes]:
    content = item.content
    if isinstance(content, Path):
        check_size(item.name, content.stat().st_size, total=0)
        return content.open("rb")
    return io.BytesIO(content if isinstance(content, bytes) else content())


def _read(item: Encoded, read: "Callable[[Image.Image], Any]") -> Any:
    """What is read of an image that PIL has opened; whatever goes wrong has the image's name."""
    from PIL import Image

    try:
        with _stream(item) as stream, _opened(stream) as image:
            _check_pixels(item.name, *image.size)
            return read(image)
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


def _opened(stream: IO[bytes]) -> "Image.Image":
    """The image, of which nothing but the header is read; Pillow's own advice stays unsaid."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(stream, formats=("JPEG", "PNG"))


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


def _is_grey(image: "Image.Image") -> bool:
    return image.mode in ("1", "L", "LA")


def to_array(image: "Image.Image", image_size: int, crop: Crops | None = None) -> np.ndarray:
    """A PIL image as uint8 [H, W, 1 or 3], cut to a square of image_size unless that is 0."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{image.mode} has more than 8 bits, which convert() would clip")
    image = image.convert("L" if _is_grey(image) else "RGB")
    if image_size:
        # One step from the part that is kept, so that no long thin image is ever blown up whole.
        box = _centre(image.size) if crop is None else _box(image.size, crop)
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def _centre(size: tuple[int, int]) -> tuple[float, ...]:
    """Left, top, right and bottom of the largest square in the middle."""
    side = min(size)
    left, top = ((length - side) // 2 for length in size)
    return left, top, left + side, top + side


def _box(size: tuple[int, int], crop: Crops) -> tuple[float, ...]:
    """Left, top, right and bottom of a rectangle: ``augment.resized_crop``'s, of a whole image."""
    area, ratio, row, column = map(float, crop.draws)
    area = (crop.least_area + area * (1 - crop.least_area)) * size[0] * size[1]
    ratio = (4 / 3) ** (2 * ratio - 1)
    width = min((area * ratio) ** 0.5, size[0])
    height = min((area / ratio) ** 0.5, size[1])
    left, top = column * (size[0] - width), row * (size[1] - height)
    return left, top, left + width, top + height


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
    check_fits(f"the images up to {name}", total, "use fewer or smaller images")
