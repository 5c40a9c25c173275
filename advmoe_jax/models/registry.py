"""The families of models, by the name that a config gives them, and networks made of their records.

A family is a record of values with defaults that can be built: it has ``from_values``,
``parts``, ``check``, ``create``, ``dense`` and ``without_padding``, as ``CNN`` has.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.nnx as nnx
import jax
import numpy as np

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import BACKBONES, CNN
from advmoe_jax.models.network import Network, functional
from advmoe_jax.models.vit import SIZES, ViT
from advmoe_jax.types import Array, Tree

Architecture = CNN | ViT

FAMILIES: dict[str, type[Architecture]] = {
    "cnn": CNN,
    "vit": ViT,
}


def create(
    architecture: Architecture, image_shape: Sequence[int], num_classes: int, key: Array
) -> tuple[Network, Tree, Tree]:
    """A functional network with its initial parameters and statistics.

    Args:
        architecture: the record of it.
        image_shape: (height, width, channels).
        num_classes: number of logits.
        key: what initial parameters are drawn from.

    Raises:
        UserError: if the record describes no network for such images.
    """
    model = architecture.create(
        in_channels=image_shape[-1], num_classes=num_classes, rngs=nnx.Rngs(params=key)
    )
    # A network that has learned where things are is one of images of its own size.
    if check := getattr(model.backbone, "check_images", None):
        check(*image_shape[:2])
    return functional(model)


def model(
    name: str,
    *,
    image_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    seed: int = 0,
    **values: Any,
) -> tuple[Network, Tree, Tree]:
    """A network by name, untrained, without a config: ``(network, params, stats)``.

    ``model("resnet18_cifar", num_experts=2, ratio=0.5)`` is AdvMoE's mixture, and
    ``network.apply(params, stats, images)[0].logits`` are its logits.

    Args:
        name: of a CNN (``models.BACKBONES``) or a transformer (``models.SIZES``).
        image_shape: (height, width, channels) of the images.
        num_classes: number of logits.
        seed: of the initial parameters.
        **values: what differs from the defaults of ``models.CNN`` or ``models.ViT``, which say what
            they mean; a group such as ``router`` takes a dict of its values.

    Raises:
        UserError: if there is no such network, or no such value of it.
    """
    if len(image_shape) != 3:
        raise UserError(f"image_shape={tuple(image_shape)} must be (height, width, channels)")
    if name not in BACKBONES and name not in SIZES:
        names = [*BACKBONES, *SIZES]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"model {name!r} is unknown; {hint}valid names: {', '.join(names)}")
    record = (CNN if name in BACKBONES else ViT)(name)
    architecture = type(record).from_values(_values(record, values))
    return create(architecture, image_shape, num_classes, jax.random.key(seed))


def _values(record: Any, changes: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """The nested values of a record, with other ones in the place of some."""
    values = record._asdict()
    for name in changes:
        if name not in values:
            near = difflib.get_close_matches(name, values, n=1) or list(values)
            raise UserError(f"{inside}{name} does not exist; did you mean {inside}{near[0]}?")
    nested: dict[str, Any] = {}
    for name, value in values.items():
        changed = changes.get(name, {} if hasattr(value, "_asdict") else value)
        changed = changed._asdict() if hasattr(changed, "_asdict") else changed
        is_group = hasattr(value, "_asdict")
        if is_group and not isinstance(changed, Mapping):
            raise UserError(f"{inside}{name} is a group: give a dict of {', '.join(value._fields)}")
        if not is_group:
            _check_type(f"{inside}{name}", changed, type(value))
        nested[name] = _values(value, changed, f"{inside}{name}.") if is_group else changed
    return nested


# By the type of a default: what may stand in its place.
_TYPES = {
    bool: (bool, np.bool_),
    int: (int, np.integer),
    float: (int, float, np.integer, np.floating),
    tuple: (tuple, list),
}


def _check_type(name: str, value: Any, kind: type) -> None:
    allowed = _TYPES.get(kind, object)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind in (int, float)):
        raise UserError(f"{name}={value!r} must be a {kind.__name__}")
