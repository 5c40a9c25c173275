"""Names of the parameters of V-MoE's published code (google-research/vmoe), and this package's."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from advmoe_jax.errors import UserError
from advmoe_jax.types import Tree

_EXACT = {
    "embedding": "embedding",
    "cls": "cls",
    "Encoder/posembed_input/pos_embedding": "positions",
    "Encoder/encoder_norm": "norm",
    "head": "head",
    "pre_logits": "representation",
}
_OF_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "SelfAttention": "attention",
    "Mlp/Dense_0": "mlp/dense1",
    "Mlp/Dense_1": "mlp/dense2",
    "Moe/Mlp/Dense_0": "mlp/dense1",
    "Moe/Mlp/Dense_1": "mlp/dense2",
}
_ROUTER = "Moe/Router/dense"


def our_name(name: str) -> str | None:
    """The path of a published parameter here, ``part/...``, the part ``router`` or ``backbone``.

    None if it is none of a ViT or V-MoE.
    """
    for theirs, ours in _EXACT.items():
        if name == theirs or name.startswith(theirs + "/"):
            return f"backbone/{ours}{name.removeprefix(theirs)}"
    if not (match := re.fullmatch(r"Encoder/encoderblock_(\d{1,4})/(.+)", name)):
        return None
    block, rest = match.groups()
    if rest.startswith(_ROUTER + "/"):
        return f"router/block{block}_mlp{rest.removeprefix(_ROUTER)}"
    for theirs, ours in _OF_BLOCK.items():
        if rest.startswith(theirs + "/"):
            return f"backbone/block{block}/{ours}{rest.removeprefix(theirs)}"
    return None


def params_of(arrays: Mapping[str, np.ndarray], like: Tree) -> Tree:
    """Published parameters by their slashed names -> this package's tree.

    Args:
        arrays: of the file.
        like: parameters of the network, arrays or their shapes; a dict of parts.

    Raises:
        UserError: if a parameter is missing, unknown, or of another shape.
    """
    rest = next(part for part in like if part != "router")
    wanted = traverse_util.flatten_dict(like, sep="/")
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        path = our_name(name)
        path = path and path.replace("backbone", rest, 1)
        if path not in wanted:
            raise UserError(f"parameter {name} is none of this network's")
        array = np.asarray(array)
        if name in ("cls", "Encoder/posembed_input/pos_embedding"):
            array = array.reshape(array.shape[-1:] if name == "cls" else array.shape[1:])
        if array.shape != tuple(wanted[path].shape):
            raise UserError(
                f"parameter {name} has shape {array.shape}, the network's {wanted[path].shape}"
            )
        found[path] = array.astype(wanted[path].dtype)
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{len(missing)} parameters are missing, such as {missing[0]}")
    return traverse_util.unflatten_dict(found, sep="/")
