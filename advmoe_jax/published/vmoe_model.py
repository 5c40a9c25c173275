"""What network a checkpoint of V-MoE's published code is of, and its parameters here."""

import math
import re
from collections.abc import Mapping

import flax.nnx as nnx
import jax
import numpy as np
from scipy import ndimage

from advmoe_jax.errors import UserError
from advmoe_jax.models.network import functional
from advmoe_jax.models.vit import SIZES, Size, ViT
from advmoe_jax.published.vmoe_names import params_of
from advmoe_jax.types import Tree

_POSITIONS = "Encoder/posembed_input/pos_embedding"
_FIRST = "Encoder/encoderblock_0/"


def network_of(arrays: Mapping[str, np.ndarray], top_k: int, image_size: int = 0) -> ViT:
    """The network that a checkpoint's arrays are of.

    Args:
        arrays: what ``vmoe_checkpoint.read`` returned.
        top_k: experts per token, which the file does not say.
        image_size: side of the images that it shall be used on; 0: those it was trained on.

    Raises:
        UserError: if an array is missing, or the arrays describe no ViT or V-MoE.
    """
    shapes = {name: array.shape for name, array in arrays.items()}

    def axis(name: str, axis: int, rank: int) -> int:
        if len(shapes.get(name, ())) != rank:
            raise UserError(
                f"the checkpoint is of no ViT or V-MoE: it has no {name} of {rank} axes"
            )
        return shapes[name][axis]

    blocks = {int(m[1]) for name in shapes if (m := re.match(r"Encoder/encoderblock_(\d+)/", name))}
    experts = {
        int(m[1]): shapes[name][-1]
        for name in shapes
        if (m := re.fullmatch(r"Encoder/encoderblock_(\d+)/Moe/Router/dense/kernel", name))
    }
    if len({*experts.values()}) > 1:
        raise UserError("the checkpoint's MoE blocks have different numbers of experts")
    mlp = "Moe/Mlp" if 0 in experts else "Mlp"
    patch, has_token = axis("embedding/kernel", 0, 4), "cls" in shapes
    patches = axis(_POSITIONS, 1, 3) - has_token
    side = math.isqrt(max(patches, 0))
    if side * side != patches or not side:
        raise UserError(f"the checkpoint's {patches} positions are no square of patches")
    size = Size(
        image=image_size or side * patch,
        patch=patch,
        layers=len(blocks),
        width=axis("embedding/kernel", 3, 4),
        hidden=axis(f"{_FIRST}{mlp}/Dense_0/kernel", -1, 3 if 0 in experts else 2),
        heads=axis(f"{_FIRST}SelfAttention/query/kernel", 1, 3),
    )
    name, changes = _named(size)
    is_moe = len(experts) > 0
    return ViT(
        name,
        num_experts=next(iter(experts.values()), 1),
        top_k=top_k if is_moe else 1,
        placement=",".join(map(str, sorted(experts))) if is_moe else "every_2",
        pool="token" if has_token else "mean",
        representation=axis("pre_logits/kernel", 1, 2) if "pre_logits/kernel" in shapes else 0,
        **changes,
    )


def _named(size: Size) -> tuple[str, dict[str, int]]:
    """The name of a size that is closest, and what differs, as ``ViT`` takes it."""
    fields = {"image": "image_size"}

    def different(name: str) -> dict[str, int]:
        pairs = zip(Size._fields, size, SIZES[name], strict=True)
        return {fields.get(field, field): own for field, own, usual in pairs if own != usual}

    name = min(SIZES, key=lambda name: len(different(name)))
    return name, different(name)


def imported(arrays: Mapping[str, np.ndarray], network: ViT) -> tuple[Tree, Tree, int]:
    """Parameters and statistics of the network with the checkpoint's values, and its classes.

    Positions are resized if the network is for images of another size.

    Raises:
        UserError: if the arrays are not those of the network.
    """
    if arrays.get("head/kernel", np.zeros(0)).ndim != 2:
        raise UserError("the checkpoint has no head, whose logits could be attacked")
    classes, channels = arrays["head/kernel"].shape[1], arrays["embedding/kernel"].shape[2]
    model = nnx.eval_shape(
        lambda: network.create(in_channels=channels, num_classes=classes, rngs=nnx.Rngs(0))
    )
    _, params, stats = functional(model)
    side = network.size.image // network.size.patch
    resized = resize_positions(arrays[_POSITIONS][0], side, network.pool == "token")
    params = params_of({**arrays, _POSITIONS: resized[None]}, params)
    return params, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), stats), classes


def resize_positions(positions: np.ndarray, side: int, has_class_token: bool) -> np.ndarray:
    """Position embeddings for another grid, by the published linear zoom of the old one.

    Args:
        positions: [T, D], the class token's first, if there is one, which stays as it is.
        side: patches in a row and in a column that are wanted.
        has_class_token: whether there is one.

    Returns:
        [side * side (+ 1), D].
    """
    first, grid = np.split(positions, [int(has_class_token)])
    old = math.isqrt(len(grid))
    if old == side:
        return positions
    square = grid.reshape(old, old, -1)
    zoomed = ndimage.zoom(square, (side / old, side / old, 1), order=1)
    return np.concatenate([first, zoomed.reshape(side * side, -1)])
