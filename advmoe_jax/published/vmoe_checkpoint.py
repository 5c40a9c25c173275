"""Reads checkpoints of V-MoE's published code (google-research/vmoe).

``PREFIX.index`` says which arrays there are, ``PREFIX.data-00000-of-000NN`` hold their pieces; both
are msgpack. Nothing that is read is executed, and no size is believed before as many values have
been found: memory is bounded by the files' own.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np
from flax import traverse_util

from advmoe_jax.errors import UserError

_VERSIONS = (None, "20220622")
_CHUNKS = "__msgpack_array_chunk_a87ca2__"
# What an extension of msgpack stands for, by its code.
_ARRAY, _SLICES, _INDEX = 1, 6, 8
_DTYPES = {
    name: jnp.dtype(name)
    for name in ("float32", "float16", "bfloat16", "float64", "int32", "uint32", "int64")
}
_MOST_SHARDS = 10_000

# First and last + 1 along each axis.
Place = tuple[tuple[int, int], ...]


class _Leaf(NamedTuple):
    """An array as the index describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype


class _Damaged(ValueError):
    """A file is not what the published code writes."""


def read(prefix: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their slashed names, such as ``head/bias``.

    Args:
        prefix: path of the files without ``.index`` and ``.data-...``.

    Raises:
        UserError: if a file is missing or damaged, naming it.
    """
    index_path = prefix.with_name(prefix.name + ".index")
    content = _unpacked(index_path)
    try:
        shards, leaves = _index(content)
    except (_Damaged, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{index_path} is no index of a V-MoE checkpoint: {error}") from None
    pieces: dict[int, list[tuple[np.ndarray, Place]]] = {}
    for shard in range(shards):
        name = f"{prefix.name}.data-{shard:05d}-of-{shards:05d}"
        path = prefix.with_name(name)
        try:
            for number, piece, place in _pieces(_unpacked(path)):
                pieces.setdefault(number, []).append((piece, place))
        except (_Damaged, ValueError, TypeError) as error:
            raise UserError(f"{path} is no part of a V-MoE checkpoint: {error}") from None
    arrays = {}
    for number, (name, leaf) in enumerate(leaves):
        try:
            arrays[name] = _joined(leaf, pieces.get(number, []))
        except _Damaged as error:
            raise UserError(f"{prefix}: parameter {name} is damaged: {error}") from None
    return _of_parameters(arrays)


def _unpacked(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the files' common path, without .index "
                        "and .data-...") from None  # fmt: skip
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return msgpack.unpackb(content, ext_hook=_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise UserError(f"{path} is damaged or no file of V-MoE's code: {error}") from None


def _extension(code: int, data: bytes) -> Any:
    if code == _ARRAY:
        return _array(data)
    if code == _SLICES:
        return _place(data)
    if code == _INDEX:
        shape_bytes, _, _ = msgpack.unpackb(data, raw=True)
        shape, dtype, _, _ = msgpack.unpackb(shape_bytes, raw=True, strict_map_key=False)
        return _Leaf(_whole_numbers(shape), _dtype(dtype))
    raise _Damaged(f"it holds something of kind {code}, which is no array")


def _array(data: bytes) -> np.ndarray:
    shape, dtype, buffer = msgpack.unpackb(data, raw=True)
    shape, dtype = _whole_numbers(shape), _dtype(dtype)
    if not isinstance(buffer, bytes) or len(buffer) != math.prod(shape) * dtype.itemsize:
        raise _Damaged("an array has another size than it says")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _place(data: bytes) -> Place:
    ends = []
    for item in msgpack.unpackb(data, raw=True):
        start, stop, step = msgpack.unpackb(item, raw=True)
        if step not in (None, 1):
            raise _Damaged(f"a slice has step {step}")
        ends.append(_whole_numbers([start or 0, stop]))
    return tuple(ends)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    values = tuple(values)
    if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in values):
        raise _Damaged(f"{values} are no sizes")
    return values


def _dtype(name: Any) -> np.dtype:
    text = name.decode() if isinstance(name, bytes) else str(name)
    if text not in _DTYPES:
        raise _Damaged(f"arrays of {text!r} are not read")
    return _DTYPES[text]


def _index(content: Any) -> tuple[int, list[tuple[str, _Leaf]]]:
    """How many shards there are, and the arrays in the order in which they are numbered."""
    if not isinstance(content, dict) or not isinstance(content.get("index"), dict):
        raise _Damaged("it has no tree of arrays")
    if (version := content.get("version")) not in _VERSIONS:
        raise _Damaged(f"its version {version!r} is not known")
    shards = content.get("shard_count")
    if not isinstance(shards, int) or not 0 < shards <= _MOST_SHARDS:
        raise _Damaged(f"shard_count={shards!r} is no number of files")
    leaves = list(_flattened(content["index"]))
    if not all(isinstance(leaf, _Leaf) for _, leaf in leaves):
        raise _Damaged("it holds something else than arrays")
    return shards, leaves


def _flattened(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """In the order of the sorted keys, as JAX flattens a tree: block_10 before block_2."""
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _flattened(tree[key], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tree[key]


def _pieces(content: Any) -> Iterator[tuple[int, np.ndarray, Place]]:
    """(number of the array, values, place in the array) of all pieces in a file."""
    if not isinstance(content, dict) or content.get(_CHUNKS) is not True:
        raise _Damaged("it holds no pieces of arrays")
    for number, pieces in content.items():
        if number == _CHUNKS:
            continue
        for parts, place in pieces:
            values = np.concatenate([np.ravel(part) for part in parts]) if parts else np.zeros(0)
            shape = tuple(stop - start for start, stop in place)
            if min(shape, default=1) < 0 or values.size != math.prod(shape):
                raise _Damaged("a piece has another size than its place")
            yield int(number), values.reshape(shape), place


def _joined(leaf: _Leaf, pieces: list[tuple[np.ndarray, Place]]) -> np.ndarray:
    if sum(piece.size for piece, _ in pieces) != math.prod(leaf.shape):
        raise _Damaged(f"its pieces do not make up its shape, {leaf.shape}")
    array, seen = np.zeros(leaf.shape, leaf.dtype), np.zeros(leaf.shape, bool)
    for piece, place in pieces:
        inside = len(place) == len(leaf.shape)
        if not inside or any(e[1] > n for e, n in zip(place, leaf.shape, strict=True)):
            raise _Damaged("a piece lies outside of it")
        if piece.dtype != leaf.dtype:
            raise _Damaged(f"a piece is of {piece.dtype}, the index says {leaf.dtype}")
        at = tuple(slice(*ends) for ends in place)
        array[at], seen[at] = piece, True
    if not seen.all():
        raise _Damaged("pieces overlap and leave holes")
    return array


def _of_parameters(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a whole training state, which has more, the parameters."""
    tree = traverse_util.unflatten_dict(arrays, sep="/")
    if "params" not in tree:
        return arrays
    return traverse_util.flatten_dict(tree["params"], sep="/")
