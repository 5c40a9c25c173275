"""A trained network as one npz file: weights, config, results, a few test images.

Nothing in such a file is executed. No size is believed before as many values have been found: what
is read is bounded by the file's own size, and must be the network that the config describes.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.files import read_npz, write_npz
from advmoe_jax.models.network import Network
from advmoe_jax.runs import build
from advmoe_jax.runs.build import ImageKind
from advmoe_jax.runs.directory import as_kind
from advmoe_jax.types import Tree

_ABOUT = "about"
_PARTS = ("params", "stats")


class Saved(NamedTuple):
    """What a file holds; see ``Run``."""

    config: ConfigDict
    kind: ImageKind
    params: Tree
    stats: Tree
    results: Mapping[str, Any] | None
    sample: Split | None


def write(path: Path, saved: Saved) -> Path:
    """Writes the file whole or not at all; an array is float16 where that changes nothing."""
    arrays: dict[str, np.ndarray] = {}
    for name in _PARTS:
        flat = traverse_util.flatten_dict(getattr(saved, name), sep="/")
        arrays |= {f"{name}/{path}": _narrowed(np.asarray(leaf)) for path, leaf in flat.items()}
    if saved.sample is not None:
        arrays["sample/images"] = np.asarray(saved.sample.images)
        arrays["sample/labels"] = np.asarray(saved.sample.labels, np.int32)
    results = saved.results and {k: v for k, v in saved.results.items() if k != "config"}
    about = {
        "config": json.loads(_without_directories(saved.config).to_json()),
        "images": saved.kind._asdict(),
        "results": results,
    }
    text = json.dumps(about).encode()
    return write_npz(path, {_ABOUT: np.frombuffer(text, np.uint8), **arrays})


def read(path: Path) -> tuple[Network, Saved]:
    """Reads what ``write`` wrote.

    Raises:
        UserError: if there is no such file, or it is damaged or of another kind.
    """
    arrays = read_npz(path)
    try:
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        values, images, results = (about[name] for name in ("config", "images", "results"))
        if not isinstance(values, dict) or not isinstance(results, dict | None):
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is no saved run: Run.save makes one") from None
    config, kind = config_lib.completed(ConfigDict(values)), as_kind(images, path)
    config_lib.check(config)
    sample = _sample(arrays, kind, path)
    network, *like = build.network_shapes(config, kind.shape[-1], len(kind.class_names))
    params, stats = (
        _fitting(arrays, name, tree, path) for name, tree in zip(_PARTS, like, strict=True)
    )
    if arrays:
        raise UserError(f"{path} holds {next(iter(arrays))}, which the network does not have")
    return network, Saved(config, kind, params, stats, results, sample)


def _narrowed(array: np.ndarray) -> np.ndarray:
    wide = array.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    return narrow if np.array_equal(narrow.astype(np.float32), wide) else wide


def _without_directories(config: ConfigDict) -> ConfigDict:
    """The config with the last names of its paths: the directories are one machine's."""
    paths = {name: config_lib.value(config, name) for name in config_lib.PATHS}
    return config_lib.with_changes(config, {k: PurePath(v).name for k, v in paths.items() if v})


def _sample(arrays: dict[str, np.ndarray], kind: ImageKind, path: Path) -> Split | None:
    images, labels = arrays.pop("sample/images", None), arrays.pop("sample/labels", None)
    if images is None or labels is None:
        return None
    fits = images.dtype == np.uint8 and images.shape[1:] == kind.shape
    fits &= labels.dtype == np.int32 and labels.shape == images.shape[:1]
    if not fits or not np.all((labels >= 0) & (labels < len(kind.class_names))):
        raise UserError(f"{path} is damaged: its sample is not of its images")
    return Split(images, labels)


def _fitting(arrays: dict[str, np.ndarray], name: str, like: Tree, path: Path) -> Tree:
    """The arrays under a name, which leave ``arrays``, as the network's own."""
    flat = {}
    for place, leaf in traverse_util.flatten_dict(like, sep="/").items():
        array = arrays.pop(f"{name}/{place}", None)
        if array is None or array.shape != leaf.shape or array.dtype.kind != "f":
            raise UserError(
                f"{path} does not fit its config: {name}/{place} is missing or of another shape"
            )
        if not np.all(np.isfinite(array)) and not place.endswith("thresholds"):
            raise UserError(f"{path} is damaged: {name}/{place} is not finite")
        flat[place] = jax.device_put(jnp.asarray(array, leaf.dtype))
    return traverse_util.unflatten_dict(flat, sep="/")
