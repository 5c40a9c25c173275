"""CNNs by name: dense, mixtures of experts, and Sparse ones, from one record of what is wanted."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Self

import flax.nnx as nnx
import jax.numpy as jnp

from advmoe_jax.errors import UserError
from advmoe_jax.models import resnet, vgg
from advmoe_jax.models.densenet import DenseNet
from advmoe_jax.models.mobilenet_v2 import MobileNetV2
from advmoe_jax.models.model import Model
from advmoe_jax.models.moe import number_layers
from advmoe_jax.models.multi_exit import attach_exits, check_places
from advmoe_jax.models.output import Normalize
from advmoe_jax.models.resnet import ResNet
from advmoe_jax.models.router import PRESETS, SCOPES, LayerRouters, LinearRouter, Router, Size
from advmoe_jax.models.small_cnn import SmallCNN
from advmoe_jax.models.sparse import prune
from advmoe_jax.models.vgg import VGG
from advmoe_jax.models.wide_resnet import WideResNet

MOST_EXPERTS = 4096
MOST_BLOCKS = 100  # of a stage of a router
MOST_PIXELS = 64  # of a side of what a linear router sees
NARROWEST = 12  # growth rate of DenseNet, the smallest published width
_FORMS = {"cifar": False, "imagenet": True}

BACKBONES: dict[str, Callable[..., nnx.Module]] = {
    **{
        f"resnet{depth}_{form}": partial(ResNet, depth, imagenet)
        for form, imagenet in _FORMS.items()
        for depth, stages in resnet.DEPTHS.items()
        if not imagenet or len(stages.blocks) == 4
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
    "small_cnn": partial(SmallCNN),
    "mobilenet_v2": partial(MobileNetV2),
}


def class_of(name: str) -> type[nnx.Module] | None:
    """The class of the backbones of that name; None if there are none."""
    backbone = BACKBONES.get(name)
    return getattr(backbone, "func", backbone)


class RouterSettings(NamedTuple):
    """What routes a mixture.

    Attributes:
        scope: ``global``, one router for the network, or ``per_layer``, one for each MoE layer.
        resolution: see ``Router``; of a global router alone, as is ``blocks``.
        width: channels of a global router's first stage; hidden units of a layer's router.
        blocks: see ``Router``; 0: a ``LinearRouter``.
    """

    scope: str = "global"
    resolution: int = PRESETS["published"].resolution
    width: int = PRESETS["published"].width
    blocks: int = PRESETS["published"].blocks

    @classmethod
    def of(cls, size: Size) -> Self:
        """A global router of that size."""
        return cls("global", *size)


class CNN(NamedTuple):
    """A convolutional network: by default a dense ResNet-18 of CIFAR's form, as published.

    Attributes:
        name: one of ``BACKBONES``.
        num_experts: kernels per convolution; 1: a dense network.
        ratio: width of one pathway over the dense network's.
        width: channels of the first convolution at ratio 1; 0: as published.
        keep: share of channels that a Sparse network reads, see ``sparse``; 1: all.
        exits: numbers of the blocks behind which side exits are; empty: none.
        raw_widening: wide ResNets as in the published code, see ``PreActivationBlock``.
        top_k: experts per image.
        gate: one of ``routing.GATES``.
        dispatch: one of ``routing.STRATEGIES``.
        block_size: images per block of the dispatch; 0: chosen by the batch.
        remat: compute activations again for the gradient instead of keeping them.
        dtype: of compute, ``float32`` or ``bfloat16``.
        param_dtype: of the parameters, likewise.
        mean: of the images, per channel or one for all.
        std: of the images, likewise.
        router: what routes, if there are several experts.
    """

    name: str = "resnet18_cifar"
    num_experts: int = 1
    ratio: float = 1.0
    width: int = 0
    keep: float = 1.0
    exits: tuple[int, ...] = ()
    raw_widening: bool = False
    top_k: int = 1
    gate: str = "straight_through"
    dispatch: str = "auto"
    block_size: int = 0
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    router: RouterSettings = RouterSettings()

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The network of a nested dict of values, such as the ``model`` part of a config.

        Raises:
            UserError: if there is no such backbone, or no exits at such places of it.
        """
        tuples = {name: tuple(values[name]) for name in ("mean", "std", "exits")}
        network = cls(**{**values, **tuples, "router": RouterSettings(**values["router"])})
        network.check_backbone()
        return network

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the network's parts, see ``Network``."""
        parts = ["experts", "router"] if self.num_experts > 1 else ["backbone"]
        parts += ["scores"] if self.keep < 1 else []
        parts += ["exits"] if self.exits else []
        more = getattr(class_of(self.name), "parts", {}).values()
        return tuple(dict.fromkeys([*parts, *more]))

    @property
    def num_exits(self) -> int:
        """How many exits there are, the main one counted."""
        return len(self.exits) + 1

    def dense(self) -> Self:
        """The dense network of full width without side exits, which costs are compared with."""
        return self._replace(num_experts=1, ratio=1.0, top_k=1, keep=1.0, exits=())

    def without_padding(self) -> Self:
        """The same network, dispatched in blocks of one image: padding is no cost of a network."""
        return self._replace(dispatch="blocks", block_size=1)

    def create(self, *, in_channels: int, num_classes: int, rngs: nnx.Rngs) -> Model:
        """Builds the network.

        Args:
            in_channels: channels of the images.
            num_classes: number of logits.
            rngs: where initial parameters come from.

        Raises:
            UserError: if a value is not one that can be built.
        """
        self.check(in_channels)
        sizes = {"in_channels": in_channels, "num_classes": num_classes}
        types = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
        backbone = BACKBONES[self.name](
            **sizes,
            num_experts=self.num_experts,
            ratio=self.ratio,
            **({"width": self.width} if self.width else {}),
            **({"raw_widening": True} if self.raw_widening else {}),
            **types,
            rngs=rngs,
        )
        if self.exits:
            attach_exits(backbone, self.exits, **sizes, **types, rngs=rngs)
        if self.keep < 1:
            prune(backbone, self.keep)
        return Model(
            Normalize(self.mean, self.std),
            backbone,
            self._create_router(backbone, in_channels, rngs),
            num_experts=self.num_experts,
            top_k=self.top_k,
            gate=self.gate,
            strategy=self.dispatch,
            block_size=self.block_size,
            remat=self.remat,
        )

    def _create_router(
        self, backbone: nnx.Module, in_channels: int, rngs: nnx.Rngs
    ) -> Router | LinearRouter | LayerRouters | None:
        if "router" not in self.parts:
            return None
        settings = self.router
        if settings.scope == "per_layer":
            features = {name: x.in_features for name, x in number_layers(backbone).items()}
            return LayerRouters(features, self.num_experts, width=settings.width, rngs=rngs)
        size = {"resolution": settings.resolution}
        if settings.blocks == 0:
            return LinearRouter(in_channels, self.num_experts, **size, rngs=rngs)
        size |= {"width": settings.width, "blocks": settings.blocks}
        return Router(in_channels, self.num_experts, **size, rngs=rngs)

    def check_backbone(self) -> None:
        """Raises UserError if there is no such backbone, or no exits at such places of it."""
        if self.name not in BACKBONES:
            near = difflib.get_close_matches(self.name, BACKBONES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"model.name={self.name!r} is unknown; {hint}valid names: {', '.join(BACKBONES)}"
            )
        kind, arguments = class_of(self.name), getattr(BACKBONES[self.name], "args", ())
        if self.exits:
            check_places(self.name, self.exits, kind, kind.count_blocks(*arguments))
        is_plain = self.num_experts == 1 and self.keep == 1 and not self.width
        if getattr(kind, "is_dense_alone", False) and not is_plain:
            raise UserError(
                f"model.name={self.name!r} is a dense network: it needs model.num_experts=1, "
                "model.keep=1 and model.width=0"
            )
        if getattr(kind, "is_of_one_width", False) and self.ratio != 1:
            raise UserError(f"model.name={self.name!r} has one width: it needs model.ratio=1.0")

    def check(self, in_channels: int) -> None:
        """Raises UserError, naming the value, if this describes no network."""
        self.check_backbone()
        if self.raw_widening and class_of(self.name) is not WideResNet:
            raise UserError(
                "model.raw_widening=True is for wide ResNets; "
                f"model.name={self.name!r} has no such blocks: set it to False"
            )
        for name, value in (
            ("num_experts", self.num_experts),
            ("router.width", self.router.width),
        ):
            if value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        for name, value, most in (
            ("num_experts", self.num_experts, MOST_EXPERTS),
            ("router.blocks", self.router.blocks, MOST_BLOCKS),
        ):
            if value > most:
                raise UserError(f"model.{name}={value} must be at most {most}")
        if self.router.scope not in SCOPES:
            raise UserError(
                f"model.router.scope={self.router.scope!r} is unknown; "
                f"choose one of {', '.join(SCOPES)}"
            )
        if self.exits and self.num_experts > 1 and self.router.scope != "global":
            raise UserError(
                "model.exits needs one route per image, known before the first exit: set "
                "model.router.scope='global'"
            )
        for name in ("blocks", "resolution"):
            if (value := getattr(self.router, name)) < 0:
                raise UserError(f"model.router.{name}={value} must not be negative")
        if self.router.blocks == 0 and not 0 < self.router.resolution <= MOST_PIXELS:
            raise UserError(
                "model.router.blocks=0 is a router that is linear in the pixels: say of how many "
                f"by model.router.resolution, 1 to {MOST_PIXELS} a side, not "
                f"{self.router.resolution}"
            )
        if not 0 < self.keep <= 1:
            raise UserError(f"model.keep={self.keep} must lie in (0, 1]")
        if self.keep < 1 and self.num_experts > 1:
            raise UserError(
                f"model.keep={self.keep} prunes a dense network; it needs model.num_experts=1, "
                f"not {self.num_experts}"
            )
        if self.width < 0:
            raise UserError(
                f"model.width={self.width} must be positive, or 0 for the published one"
            )
        narrowest = (self.width or NARROWEST) * self.ratio
        if not 0 < self.ratio <= 1 or narrowest < 1:
            raise UserError(
                f"model.ratio={self.ratio} must lie in (0, 1] and leave model.width={self.width} "
                "at least one channel"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, in_channels):
                raise UserError(
                    f"model.{name} has {len(values)} values; the images have {in_channels} "
                    f"channels: give {' or '.join(map(str, sorted({1, in_channels})))}"
                )
        if min(self.std) <= 0:
            raise UserError(f"model.std={tuple(self.std)} must be positive")
        for name, value in (("dtype", self.dtype), ("param_dtype", self.param_dtype)):
            if value not in ("float32", "bfloat16"):
                raise UserError(f"model.{name}={value!r} must be 'float32' or 'bfloat16'")
