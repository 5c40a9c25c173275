"""Networks by name, from a config."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax.numpy as jnp
from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.models import resnet, vgg
from advmoe_jax.models.densenet import DenseNet
from advmoe_jax.models.layers import Conv
from advmoe_jax.models.moe import number_layers
from advmoe_jax.models.network import Model, Normalize
from advmoe_jax.models.resnet import ResNet
from advmoe_jax.models.router import PRESETS, SCOPES, LayerRouters, Router
from advmoe_jax.models.vgg import VGG
from advmoe_jax.models.wide_resnet import WideResNet

NARROWEST = 12  # growth rate of DenseNet, the smallest published width
_FORMS = {"cifar": False, "imagenet": True}

BACKBONES: dict[str, Callable[..., nnx.Module]] = {
    **{
        f"resnet{depth}_{form}": partial(ResNet, depth, imagenet)
        for form, imagenet in _FORMS.items()
        for depth in resnet.DEPTHS
    },
    **{
        f"wrn_{depth}_{factor}_{form}": partial(WideResNet, depth, factor, imagenet)
        for form, imagenet in _FORMS.items()
        for depth, factor in ((28, 4), (28, 10), (34, 10))
    },
    **{
        f"vgg{depth}{suffix}": partial(VGG, depth, batch_norm)
        for suffix, batch_norm in (("", False), ("_bn", True))
        for depth in vgg.DEPTHS
    },
    **{f"densenet_{form}": partial(DenseNet, imagenet) for form, imagenet in _FORMS.items()},
}


def model_config(
    name: str, *, router: Mapping[str, Any] | None = None, **changes: Any
) -> ConfigDict:
    """The ``model`` part of a config: a dense network in float32 unless ``changes`` say otherwise.

    Args:
        name: one of ``BACKBONES``.
        router: what differs from the published, global router.
        **changes: what else differs, such as ``num_experts=2, ratio=0.5``.
    """
    values = {
        "name": name,
        "num_experts": 1,
        "ratio": 1.0,
        "width": 0,
        "keep": 1.0,
        "raw_widening": False,
        "top_k": 1,
        "gate": "straight_through",
        "dispatch": "auto",
        "block_size": 0,
        "remat": False,
        "dtype": "float32",
        "param_dtype": "float32",
        "mean": (0.5,),
        "std": (0.25,),
    }
    published = {"scope": "global", **PRESETS["published"]._asdict()}
    return ConfigDict({**values, **changes, "router": {**published, **(router or {})}})


def create_model(
    config: ConfigDict, *, in_channels: int, num_classes: int, rngs: nnx.Rngs
) -> Model:
    """Builds the network that ``config.model`` describes.

    Args:
        config: the ``model`` part of a config: ``name``, ``num_experts`` (1: dense), ``ratio``,
            ``width`` (0: as published), ``keep`` (below 1: a Sparse network, see ``sparse``),
            ``raw_widening``, ``top_k``, ``gate``, ``dispatch``, ``block_size``, ``remat``,
            ``dtype``, ``param_dtype``, ``mean``, ``std`` and ``router`` (``scope``, ``resolution``,
            ``width``, ``blocks``).
        in_channels: channels of the images.
        num_classes: number of logits.
        rngs: where initial parameters come from.

    Raises:
        UserError: if a value is not one that can be built.
    """
    check(config, in_channels)
    backbone = BACKBONES[config.name](
        in_channels=in_channels,
        num_classes=num_classes,
        num_experts=config.num_experts,
        ratio=config.ratio,
        **({"width": config.width} if config.width else {}),
        **({"raw_widening": True} if config.raw_widening else {}),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
    if config.keep < 1:
        _sparsify(backbone, config.keep)
    return Model(
        Normalize(config.mean, config.std),
        backbone,
        _create_router(config, backbone, in_channels, rngs),
        num_experts=config.num_experts,
        top_k=config.top_k,
        gate=config.gate,
        strategy=config.dispatch,
        block_size=config.block_size,
        remat=config.remat,
    )


def _sparsify(backbone: nnx.Module, keep: float) -> None:
    """Prunes every convolution but the first, which reads the image."""
    for path, node in list(nnx.iter_graph(backbone)):
        if isinstance(node, Conv) and path not in (("stem",), ("conv1_0",)):
            node.prune(keep)


def _create_router(
    config: ConfigDict, backbone: nnx.Module, in_channels: int, rngs: nnx.Rngs
) -> Router | LayerRouters | None:
    if config.num_experts == 1:
        return None
    settings = config.router
    if settings.scope == "per_layer":
        layers = number_layers(backbone)
        channels = {name: layer.kernel.shape[-2] for name, layer in layers.items()}
        return LayerRouters(channels, config.num_experts, width=settings.width, rngs=rngs)
    return Router(
        in_channels,
        config.num_experts,
        resolution=settings.resolution,
        width=settings.width,
        blocks=settings.blocks,
        rngs=rngs,
    )


def check(config: ConfigDict, in_channels: int) -> None:
    """Raises UserError, naming the value, if ``config.model`` describes no network."""
    if config.name not in BACKBONES:
        near = difflib.get_close_matches(config.name, BACKBONES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"model.name={config.name!r} is unknown; {hint}valid names: {', '.join(BACKBONES)}"
        )
    if config.raw_widening and BACKBONES[config.name].func is not WideResNet:
        raise UserError(
            f"model.raw_widening=True is for wide ResNets; model.name={config.name!r} has no such "
            "blocks: set it to False"
        )
    for name, value in (
        ("num_experts", config.num_experts),
        ("router.width", config.router.width),
        ("router.blocks", config.router.blocks),
    ):
        if value < 1:
            raise UserError(f"model.{name}={value} must be at least 1")
    if config.router.scope not in SCOPES:
        raise UserError(
            f"model.router.scope={config.router.scope!r} is unknown; "
            f"choose one of {', '.join(SCOPES)}"
        )
    if config.router.resolution < 0:
        raise UserError(f"model.router.resolution={config.router.resolution} must not be negative")
    if not 0 < config.keep <= 1:
        raise UserError(f"model.keep={config.keep} must lie in (0, 1]")
    if config.keep < 1 and config.num_experts > 1:
        raise UserError(
            f"model.keep={config.keep} prunes a dense network; it needs model.num_experts=1, "
            f"not {config.num_experts}"
        )
    if config.width < 0:
        raise UserError(f"model.width={config.width} must be positive, or 0 for the published one")
    narrowest = (config.width or NARROWEST) * config.ratio
    if not 0 < config.ratio <= 1 or narrowest < 1:
        raise UserError(
            f"model.ratio={config.ratio} must lie in (0, 1] and leave model.width={config.width} "
            "at least one channel"
        )
    for name, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, in_channels):
            raise UserError(
                f"model.{name} has {len(values)} values; the images have {in_channels} channels: "
                f"give 1 or {in_channels}"
            )
    if min(config.std) <= 0:
        raise UserError(f"model.std={tuple(config.std)} must be positive")
    for name, value in (("dtype", config.dtype), ("param_dtype", config.param_dtype)):
        if value not in ("float32", "bfloat16"):
            raise UserError(f"model.{name}={value!r} must be 'float32' or 'bfloat16'")
