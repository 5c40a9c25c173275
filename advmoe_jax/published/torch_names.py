"""The published code's names and layouts for our parameters: one table a family, used both ways.

The published code (PyTorch) keeps convolutions as OIHW, the experts of a layer stacked along O
(expert e at rows e * width to (e + 1) * width), linear layers as [out, in]. An MoE holds its one
router as a child of the network and again of every convolution with experts, so that its
``state_dict`` lists the router under each of them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from advmoe_jax.errors import UserError
from advmoe_jax.models import vgg
from advmoe_jax.models.trunk import NEVER
from advmoe_jax.published import rdi

Tree = dict[str, Any]
_Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

ROUTER = "router."
# Networks whose published form is given a normalisation layer, but never calls it.
WITHOUT_NORMALIZATION = ("vgg", "densenet")
_SHOWN = 6
_THRESHOLDS = "/thresholds"

_BLOCKS: _Rules = ((r"layer(\d)_(\d+)/(\w+)", r"layer\1.\2.\3"),)
_STEM: _Rules = (("stem", "conv1"), ("bn", "bn1"))
_DENSE_LAYERS: _Rules = tuple(
    (
        rf"layer(\d)_(\d+)/{ours}(\d)",
        lambda m, theirs=theirs: (
            f"features.denseblock{m[1]}.denselayer{int(m[2]) + 1}.{theirs}{m[3]}"
        ),
    )
    for ours, theirs in (("bn", "norm"), ("conv", "conv"))
)


def _shortcut(name: str) -> _Rules:
    return tuple(
        (rf"layer(\d)_(\d+)/shortcut_{part}", rf"layer\1.\2.{name}.{i}")
        for i, part in enumerate(("conv", "bn"))
    )


def _vgg(match: re.Match[str]) -> _Rules:
    """VGG's features are one sequence, in which activations and pools count too."""
    depth, batch_norm = int(match[1]), bool(match[2])
    rules, position = [("hidden1", "classifier.0"), ("hidden2", "classifier.2")], 0
    for stage, count in enumerate(vgg.DEPTHS[depth]):
        position += stage > 0
        for i in range(count):
            rules.append((f"conv{stage + 1}_{i}", f"features.{position}"))
            rules.append((f"bn{stage + 1}_{i}", f"features.{position + 1}"))
            position += 3 if batch_norm else 2
    return (*rules, ("head", "classifier.4"))


# Name of a network -> rules from our modules to theirs; the first rule that fits decides.
_FAMILIES: dict[str, _Rules | Callable[[re.Match[str]], _Rules]] = {
    **{name: network.rules for name, network in rdi.NETWORKS.items()},
    r"resnet\d+_cifar": (*_STEM, *_shortcut("shortcut"), *_BLOCKS, ("head", "linear")),
    r"resnet\d+_imagenet": (*_STEM, *_shortcut("downsample"), *_BLOCKS, ("head", "fc")),
    r"wrn_\d+_\d+_(?:cifar|imagenet)": (
        *_STEM,
        ("stem_bn", "bn0"),
        (r"layer(\d)_(\d+)/shortcut", r"block\1.layer.\2.convShortcut"),
        (r"layer(\d)_(\d+)/(\w+)", r"block\1.layer.\2.\3"),
        ("head", "fc"),
    ),
    r"vgg(\d+)(_bn)?": _vgg,
    r"densenet_(?:cifar|imagenet)": (
        ("stem", "features.conv0"),
        ("stem_bn", "features.norm0"),
        *_DENSE_LAYERS,
        (r"transition(\d)/bn", r"features.transition\1.norm"),
        (r"transition(\d)/conv", r"features.transition\1.conv"),
        ("bn", "features.norm_final"),
        ("head", "classifier"),
    ),
    "router": (*_STEM, *_BLOCKS, ("head", "fc")),
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def module(name: str, ours: str) -> str:
    """The published name of one of our modules.

    Args:
        name: of the network, such as ``resnet18_cifar``, or ``router``.
        ours: path of the module, such as ``layer1_0/conv1``.

    Raises:
        KeyError: if the network or the module is not one that the published code has.
    """
    for family, rules in _FAMILIES.items():
        if match := re.fullmatch(family, name):
            for pattern, theirs in rules(match) if callable(rules) else rules:
                if found := re.fullmatch(pattern, ours):
                    return theirs(found) if callable(theirs) else found.expand(theirs)
    raise KeyError(f"{name}: {ours}")


def to_torch(name: str, params: Tree, stats: Tree) -> dict[str, np.ndarray]:
    """The published network's ``state_dict``; the router's part of it starts with ``ROUTER``.

    Args:
        name: of the network, such as ``resnet18_cifar``.
        params: float arrays, a dict of the network's parts.
        stats: BatchNorm statistics, likewise.

    Returns:
        float32 arrays by name, and ``num_batches_tracked``: int64 zeros. The copies of the router
        under convolutions with experts are the same arrays.
    """
    tensors, owners = {}, []
    for leaf in _leaves(name, params, stats):
        array = np.asarray(leaf.array).astype(np.float32)
        tensors[leaf.theirs] = np.ascontiguousarray(_to_theirs(array, leaf.spatial))
        if array.ndim == 5:
            owners.append(leaf.theirs.removesuffix("weight"))
        if leaf.theirs.endswith("running_var"):
            count = leaf.theirs.replace("running_var", "num_batches_tracked")
            tensors[count] = np.zeros((), np.int64)
    for unused, shape in _unused(name).items():
        tensors[f"{unused}.weight"] = np.zeros(shape, np.float32)
    router = {key: tensor for key, tensor in tensors.items() if key.startswith(ROUTER)}
    copies = {owner + key: tensor for owner in owners for key, tensor in router.items()}
    return tensors | copies


def from_torch(
    name: str, tensors: Mapping[str, np.ndarray], params: Tree, stats: Tree
) -> tuple[Tree, Tree]:
    """The inverse of ``to_torch``.

    Args:
        name: of the network.
        tensors: as ``to_torch`` returns them; ``num_batches_tracked`` and copies of the router may
            be absent.
        params: arrays or ``jax.ShapeDtypeStruct``s in the shapes that the network has.
        stats: likewise.

    Returns:
        (params, stats) of float32 numpy arrays.

    Raises:
        UserError: naming tensors that are missing, left over, of another shape or not of floating
            point, and copies of the router that differ from it.
    """
    leaves = list(_leaves(name, params, stats))
    owners = {x.theirs.removesuffix("weight") for x in leaves if len(x.array.shape) == 5}
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".num_batches_tracked")}
    problems = _differing_copies(tensors, owners)
    tensors = {k: v for k, v in tensors.items() if _owner(k) not in owners}
    for leaf in leaves:
        wanted = _their_shape(leaf.array.shape)
        tensor = tensors.get(leaf.theirs)
        if tensor is None:
            problems.append(f"{leaf.theirs} is missing")
        elif tensor.shape != wanted:
            problems.append(f"{leaf.theirs} is {list(tensor.shape)}, not {list(wanted)}")
        elif tensor.dtype not in (np.float32, np.float16):
            problems.append(f"{leaf.theirs} is {tensor.dtype}, not float32")
    known = {leaf.theirs for leaf in leaves} | {f"{unused}.weight" for unused in _unused(name)}
    problems += [f"{_printable(k)} is left over" for k in tensors if k not in known]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(f"{'; '.join(problems[:_SHOWN])}{more}")
    trees = {"params": {}, "stats": {}}
    for leaf in leaves:
        array = tensors[leaf.theirs].astype(np.float32)
        array = _to_ours(array, leaf.array.shape, leaf.spatial)
        trees[leaf.tree][leaf.ours] = np.ascontiguousarray(array)
    for path, array in traverse_util.flatten_dict(stats, sep="/").items():
        if path.endswith(_THRESHOLDS):  # the published code keeps them elsewhere
            trees["stats"][path] = np.full(array.shape, NEVER, np.float32)
    empty = {part: {} for part in params}
    return tuple(empty | traverse_util.unflatten_dict(tree, sep="/") for tree in trees.values())


class _Leaf(NamedTuple):
    """One array: its tree, its path there, its published name.

    ``spatial`` is the height of the feature maps that a linear layer reads flattened; 0: none.
    """

    tree: str
    ours: str
    theirs: str
    array: Any
    spatial: int


def _leaves(name: str, params: Tree, stats: Tree) -> Iterator[_Leaf]:
    for tree, branches in (("params", params), ("stats", stats)):
        for path, array in traverse_util.flatten_dict(branches, sep="/").items():
            if path.endswith(_THRESHOLDS):
                continue
            branch, *inside, leaf = path.split("/")
            is_router = branch == "router"
            owner = module("router" if is_router else name, "/".join(inside))
            theirs = f"{ROUTER if is_router else ''}{owner}.{_LEAVES[leaf]}"
            spatial = _spatial(name, "/".join(inside)) if leaf == "kernel" else 0
            yield _Leaf(tree, path, theirs, array, spatial)


def _spatial(name: str, module: str) -> int:
    """The height of the feature maps that a linear layer reads flattened; VGG's are 2x2."""
    if name in rdi.NETWORKS:
        return rdi.NETWORKS[name].spatial.get(module, 0)
    return 2 if module == "hidden1" else 0


def _unused(name: str) -> dict[str, tuple[int, ...]]:
    return rdi.NETWORKS[name].unused if name in rdi.NETWORKS else {}


def _owner(key: str) -> str | None:
    """``layer1.0.conv1.`` of a router's copy ``layer1.0.conv1.router.fc.bias``."""
    owner, dot, _ = key.partition("." + ROUTER)
    return owner + "." if dot else None


def _differing_copies(tensors: Mapping[str, np.ndarray], owners: set[str]) -> list[str]:
    problems = []
    for key, copy in tensors.items():
        if (owner := _owner(key)) in owners:
            original = tensors.get(key.removeprefix(owner))
            if original is None:
                problems.append(f"{_printable(key)} is left over")
            elif original is not copy and not _same(original, copy):
                problems.append(f"{_printable(key)} differs from {key.removeprefix(owner)}")
    return problems


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def _to_theirs(array: np.ndarray, spatial: int) -> np.ndarray:
    shape = array.shape
    if spatial:  # [H * W * C, out] -> [out, C * H * W]
        array = array.reshape(spatial, spatial, -1, shape[1]).transpose(3, 2, 0, 1)
    elif len(shape) == 5:
        array = array.transpose(0, 4, 3, 1, 2)
    elif len(shape) in (2, 4):
        array = array.transpose((3, 2, 0, 1) if len(shape) == 4 else (1, 0))
    return array.reshape(_their_shape(shape))


def _to_ours(array: np.ndarray, shape: tuple[int, ...], spatial: int) -> np.ndarray:
    if spatial:
        array = array.reshape(shape[1], -1, spatial, spatial).transpose(2, 3, 1, 0)
    elif len(shape) == 5:
        n, height, width, inputs, outputs = shape
        array = array.reshape(n, outputs, inputs, height, width).transpose(0, 3, 4, 2, 1)
    elif len(shape) in (2, 4):
        array = array.transpose((2, 3, 1, 0) if len(shape) == 4 else (1, 0))
    return array.reshape(shape)


def _their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return shape[::-1]
    if len(shape) in (4, 5):
        *experts, height, width, inputs, outputs = shape
        return math.prod(experts) * outputs, inputs, height, width
    return tuple(shape)


def _printable(name: str) -> str:
    """A name from a stranger's file, fit for one line."""
    return name if re.fullmatch(r"[\w.]{1,100}", name, re.ASCII) else ascii(name[:100])
