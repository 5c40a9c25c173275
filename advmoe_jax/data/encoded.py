"""Images that are decoded when they are read: in the place of an array of them."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from advmoe_jax.data.decoding import Crops, Encoded, decode


class EncodedImages:
    """Images uint8 [N, H, W, C] in the place of an array of them.

    Indexing selects, and decodes nothing; ``np.asarray`` decodes what was selected.

    Args:
        items: of the data set.
        image_shape: (H, W, C) of all images.
        image_size: see ``decoding.to_array``.
        indices: int [N], which of the items these are; None: all.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        items: Sequence[Encoded],
        image_shape: tuple[int, int, int],
        image_size: int,
        indices: np.ndarray | None = None,
    ) -> None:
        self._items, self._image_shape, self._image_size = items, image_shape, image_size
        self._indices = np.arange(len(items)) if indices is None else indices

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        return (len(self._indices), *self._image_shape)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, at: Any) -> "EncodedImages | np.ndarray":
        indices = self._indices[at]
        if np.ndim(indices) == 0:
            return self.decoded(at=np.array([at]))[0]
        return EncodedImages(self._items, self._image_shape, self._image_size, indices)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = self.decoded()
        return images if dtype is None else images.astype(dtype)

    def astype(self, dtype: Any) -> np.ndarray:
        """All of them, decoded."""
        return self.decoded().astype(dtype)

    def decoded(
        self, at: Any = slice(None), crops: Crops | None = None, threads: int | None = None
    ) -> np.ndarray:
        """The images at these places, uint8 [n, H, W, C].

        Args:
            at: int [n], or a slice.
            crops: see ``decoding.decode``.
            threads: likewise.

        Raises:
            UserError: if an image cannot be decoded or has another size.
        """
        items = [self._items[i] for i in self._indices[at]]
        return decode(items, self._image_size, self._image_shape, crops, threads)

    def __repr__(self) -> str:
        """Tells sets of images apart, by the names of the images: nothing is decoded for it."""
        digest = hashlib.sha256()
        for index in self._indices:
            digest.update(self._items[index].name.encode(errors="replace") + b"\0")
        shape = "x".join(map(str, self.shape))
        return f"EncodedImages({shape}, sha256 of names {digest.hexdigest()})"
