"""The files of the published code: PyTorch dictionaries, read without trusting them.

A file holds ``state_dict`` (the network's tensors, the router's copies among them), ``router`` (an
MoE's), ``epoch``, ``arch``, ``best_acc``, ``sa_record`` and the state of the optimizers.
"""

import io
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.nnx as nnx
import numpy as np

from advmoe_jax.errors import UserError
from advmoe_jax.files import write_bytes
from advmoe_jax.models.cnn import CNN, class_of
from advmoe_jax.models.network import functional
from advmoe_jax.published import rdi, torch_names
from advmoe_jax.published.torch_names import ROUTER

Tree = dict[str, Any]

_NORMALIZE = ("normalize.mean", "normalize.std")
# How the format before PyTorch 1.6 begins: a pickle of its magic number. PyTorch reads it too
# without running anything, and compares the sizes that are declared with the bytes that are there.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class TorchCheckpoint(NamedTuple):
    """What the file says.

    Attributes:
        tensors: the ``state_dict`` and, under ``ROUTER``, the router; numpy arrays by name.
        mean, std: of the normalisation, one float per channel; None if the file has none.
        arch: the published name of the network, such as ``resnet18_cifar_moe``; "" if unknown.
        epoch: completed epochs, or RDI-Nets' iterations; 0 if unknown.
    """

    tensors: dict[str, np.ndarray]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    arch: str = ""
    epoch: int = 0


def read(path: Path) -> TorchCheckpoint:
    """Reads a file without executing anything in it, nor believing the sizes it declares.

    Raises:
        UserError: if PyTorch is not installed, or the file is not a checkpoint, is damaged, or
            holds anything but tensors and plain values.
    """
    torch = _torch()
    _check_container(path)
    content = _load(torch, path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise UserError(f"{path} is no checkpoint of the published code: it has no state_dict")
    tensors = _tensors(torch, path, content["state_dict"])
    normalize = [tensors.pop(name, None) for name in _NORMALIZE]
    if isinstance(content.get("router"), Mapping):
        for name, tensor in _tensors(torch, path, content["router"]).items():
            inside = tensors.setdefault(ROUTER + name, tensor)
            if not np.array_equal(inside, tensor, equal_nan=True):
                raise UserError(f"{path} has two routers: {ROUTER}{name} is not the same in both")
    mean, std = (_channels(path, n, x) for n, x in zip(_NORMALIZE, normalize, strict=True))
    arch, epoch = content.get("arch"), content.get("epoch", content.get("iter"))
    return TorchCheckpoint(
        tensors,
        mean,
        std,
        arch if isinstance(arch, str) else "",
        epoch if isinstance(epoch, int) and 0 <= epoch < 2**31 else 0,
    )


def arrays_of(architecture: CNN, checkpoint: TorchCheckpoint) -> tuple[Tree, Tree]:
    """Parameters and statistics of a checkpoint, in our names and layouts.

    Args:
        architecture: what network the checkpoint is of. The channels of the images and the number
            of classes are the checkpoint's.
        checkpoint: what ``read`` returned.

    Returns:
        (params, stats), each a dict of the network's parts, of float32 numpy arrays.

    Raises:
        UserError: if this describes no network, or another one; tensors that are missing, left
            over or of another shape are named.
    """
    name = architecture.name
    architecture.check(len(architecture.mean))
    stem, head = (
        checkpoint.tensors.get(f"{torch_names.module(name, ours)}.weight")
        for ours in (class_of(name).first, "head")
    )
    channels = stem.shape[1] if stem is not None and stem.ndim == 4 and stem.shape[1] == 1 else 3
    architecture.check(channels)
    classes = max(1, head.shape[0]) if head is not None and head.ndim == 2 else 1
    model = nnx.eval_shape(
        lambda: architecture.create(in_channels=channels, num_classes=classes, rngs=nnx.Rngs(0))
    )
    _, params, stats = functional(model)
    return torch_names.from_torch(name, checkpoint.tensors, params, stats)


def write(path: Path, checkpoint: TorchCheckpoint) -> None:
    """Writes what the published code can load, optimizers in their initial state.

    Raises:
        UserError: if PyTorch is not installed, the file exists, or cannot be written.
    """
    torch = _torch()
    content = _content(torch, checkpoint)
    if path.exists():
        raise UserError(f"{path} exists already: name another file, or move it away")
    file = io.BytesIO()
    torch.save(content, file)
    try:
        write_bytes(path, file.getvalue())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _content(torch: ModuleType, checkpoint: TorchCheckpoint) -> dict[str, Any]:
    """What is written, in the form that the code of the network resumes from."""
    tensors = {name: torch.from_numpy(x) for name, x in _shared(checkpoint.tensors).items()}
    if checkpoint.arch in {network.arch for network in rdi.NETWORKS.values()}:
        state = {f"module.{name}": tensor for name, tensor in tensors.items()}
        told = {"arch": checkpoint.arch, "iter": checkpoint.epoch, "best_prec1": 0.0}
        return {**told, "state_dict": state}
    for name, values in zip(_NORMALIZE, (checkpoint.mean, checkpoint.std), strict=True):
        if values is not None:
            tensors[name] = torch.tensor(values, dtype=torch.float32)
    router = {k.removeprefix(ROUTER): v for k, v in tensors.items() if k.startswith(ROUTER)}
    backbone = {k for k in tensors if ROUTER not in k and k not in _NORMALIZE}
    content = {
        "epoch": checkpoint.epoch,
        "arch": checkpoint.arch,
        "state_dict": tensors,
        "best_acc": 0.0,
        "sa_record": 0.0,
        "optimizer": _optimizer(backbone),
    }
    if router:
        content |= {"router": router, "router_optimizer": _optimizer(router)}
    return content


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed: run `pip install 'advmoe_jax[torch]'`, or, in a checkout, "
            "`pip install -e '.[torch]'`"
        ) from None
    return torch


def _check_container(path: Path) -> None:
    """Refuses, before PyTorch opens it, what is no whole zip file, or inflates when read."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name the .pth.tar file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file that holds a checkpoint: name the .pth.tar file")
    try:
        size = os.stat(path).st_size
        with path.open("rb") as file:
            start = file.read(len(_LEGACY))
        is_zip = start.startswith(b"PK\x03\x04")
        archive = zipfile.ZipFile(path) if is_zip else None
        members = archive.infolist() if archive else []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # zipfile says what it finds in many ways
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged or cut short ({reason}): fetch it again") from None
    if start == _LEGACY:
        return
    if archive is None:
        raise UserError(
            f"{path} is no checkpoint, neither in the zip format that torch.save writes since "
            "PyTorch 1.6 nor in the one before it"
        )
    if sum(member.file_size for member in members) > size:
        raise UserError(f"{path} declares more bytes than it has: it is no checkpoint to trust")
    try:  # PyTorch does not look at the checksums
        damaged = archive.testzip()
    except Exception as error:
        damaged = " ".join(str(error).split())[:100] or type(error).__name__
    if damaged is not None:
        raise UserError(f"{path} is damaged ({damaged}): fetch it again")


class _Skipped:
    """Stands for what we do not read: NumPy's scalars (learning rates) and their dtype."""

    def __init__(self, *values: Any) -> None:
        del values

    def __setstate__(self, state: Any) -> None:
        del state


def _load(torch: ModuleType, path: Path) -> Any:
    # The published cosine schedule leaves NumPy scalars in the optimizers' state, which PyTorch
    # does not read without being told that they may be.
    names = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    skipped = [(_Skipped, name) for name in names]
    try:
        with torch.serialization.safe_globals(skipped):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes it raise almost anything
        text = " ".join(str(error).split())
        if found := re.search(r"GLOBAL ([\w.]{1,80}) (?:was not an|whose module)", text):
            raise UserError(
                f"{path} asks to run {found[1]}, which no checkpoint needs: it was refused, and "
                "nothing in it was run"
            ) from None
        if "pickle" in type(error).__name__.lower():
            text = "it holds more than tensors and plain values, or is damaged"
        raise UserError(f"{path} cannot be read as a checkpoint: {text[:150]}") from None


def _tensors(torch: ModuleType, path: Path, state: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    """Arrays by name, without ``DataParallel``'s prefix; aliases stay aliases."""
    prefix = "module." if all(str(name).startswith("module.") for name in state) else ""
    arrays: dict[tuple[Any, ...], np.ndarray] = {}
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} holds {ascii(name)[:100]}, which is no tensor")
        # A stride of zero makes a few bytes look like any number of them.
        size = tensor.numel() * tensor.element_size()
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or size > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {ascii(name)[:100]} declares more values than it has")
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if place not in arrays:
            exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            try:
                arrays[place] = exact.detach().numpy()
            except (TypeError, RuntimeError):
                kind = tensor.dtype
                raise UserError(
                    f"{path}: {ascii(name)[:100]} is of a kind ({kind}) that no network here has"
                ) from None
        array = arrays[place]
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise UserError(f"{path}: {ascii(name)[:100]} has values that are not finite")
        tensors[name.removeprefix(prefix)] = array
    return tensors


def _channels(path: Path, name: str, values: np.ndarray | None) -> tuple[float, ...] | None:
    if values is None:
        return None
    if values.ndim != 1 or values.dtype != np.float32 or not np.isfinite(values).all():
        raise UserError(f"{path}: {name} must be finite numbers, one per channel")
    return tuple(float(str(x)) for x in values)  # the shortest decimals that name these floats


def _shared(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Writable arrays, copied once each: PyTorch warns of read-only memory, and keeps aliases."""
    copies = {id(array): array.copy() for array in tensors.values()}
    return {name: copies[id(array)] for name, array in tensors.items()}


def _optimizer(names: Any) -> dict[str, Any]:
    """The state of a ``torch.optim.SGD`` that has not stepped, with the published settings."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    count = sum(not name.endswith(buffers) for name in names)
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 5e-4}
    flags = {"nesterov": False, "maximize": False, "foreach": None, "differentiable": False}
    group = {**settings, **flags, "fused": None, "params": list(range(count))}
    return {"state": {}, "param_groups": [group]}
