"""Vision transformers by name, dense (ViT) and with sparse experts (V-MoE), by the same code.

Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929), and Riquelme et al., NeurIPS 2021 (arXiv
2106.05974), in the form of V-MoE's published code. Of several experts, the MLPs of some blocks are
mixtures: every token, the class token too, goes to ``top_k`` experts of each such block.
"""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import flax.nnx as nnx
import jax.numpy as jnp

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import MOST_EXPERTS
from advmoe_jax.models.dense_layers import dropout
from advmoe_jax.models.layers import Context, Linear, normal_init, run_layer
from advmoe_jax.models.model import Model
from advmoe_jax.models.moe import number_layers
from advmoe_jax.models.output import Normalize
from advmoe_jax.models.router import LayerRouters
from advmoe_jax.models.transformer import (
    Attention,
    Dense,
    ExpertMlp,
    LayerNorm,
    Mlp,
    TokenRouter,
)
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.types import Array


class Size(NamedTuple):
    """How large a transformer is: side of its images and patches in pixels, blocks, widths."""

    image: int
    patch: int
    layers: int
    width: int
    hidden: int
    heads: int


SIZES = {
    "vit_s32": Size(224, 32, 8, 512, 2048, 8),
    "vit_b32": Size(224, 32, 12, 768, 3072, 12),
    "vit_b16": Size(224, 16, 12, 768, 3072, 12),
    "vit_l16": Size(224, 16, 24, 1024, 4096, 16),
    # Of ours, by the side of their images: digits, MNIST, CIFAR, Tiny-ImageNet.
    "vit_tiny_8": Size(8, 2, 4, 32, 64, 4),
    "vit_tiny_28": Size(28, 4, 4, 64, 128, 4),
    "vit_tiny_32": Size(32, 4, 8, 192, 768, 3),
    "vit_tiny_64": Size(64, 8, 8, 256, 1024, 4),
}
POOLS = ("token", "mean")
_SITES = 4  # places of a block where something may be dropped


class ViT(NamedTuple):
    """A vision transformer: by default a dense ViT-S/32 of 224x224 images, as published.

    Attributes:
        name: one of ``SIZES``.
        num_experts: MLPs of an MoE block; 1: a dense network, ViT.
        top_k: experts per token and MoE block.
        placement: which blocks are mixtures: ``every_n`` (every_2: blocks 1, 3, 5, ...), ``last_n``
            (the last n of those of every_2), or their numbers from 0, such as ``5,7``.
        image_size: height and width of the images; 0: the named size's. So for the next five:
        patch: height and width of a patch.
        layers: blocks.
        width: of a token.
        hidden: units of an MLP, and of each expert.
        heads: of attention.
        pool: what the head sees: a class ``token``, or the ``mean`` of all tokens.
        representation: units of a tanh layer in front of the head; 0: none.
        dropout: rate after attention, after both layers of an MLP and on embedded patches.
        attention_dropout: rate on the shares of attention.
        expert_dropout: rate in the experts' MLPs, in the place of ``dropout``.
        identical_experts: whether all experts of a block start from the same values, as published.
        capacity: places of the experts; by default no choice is ever dropped.
        gate: one of ``routing.GATES``; ``noisy_softmax`` is the published one.
        dispatch: one of ``routing.STRATEGIES``.
        block_size: tokens per block of the dispatch; 0: chosen by the batch.
        remat: compute activations again for the gradient, in a dense network.
        dtype: of compute, ``float32`` or ``bfloat16``; routing is float32 always.
        param_dtype: of the parameters, likewise.
        mean: of the images, per channel or one for all.
        std: of the images, likewise.
    """

    name: str = "vit_s32"
    num_experts: int = 1
    top_k: int = 1
    placement: str = "every_2"
    image_size: int = 0
    patch: int = 0
    layers: int = 0
    width: int = 0
    hidden: int = 0
    heads: int = 0
    pool: str = "token"
    representation: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    expert_dropout: float = 0.0
    identical_experts: bool = False
    capacity: Capacity = Capacity()
    gate: str = "noisy_softmax"
    dispatch: str = "auto"
    block_size: int = 0
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The network of a nested dict of values, such as the ``model`` part of a config."""
        tuples = {name: tuple(values[name]) for name in ("mean", "std")}
        return cls(**{**values, **tuples, "capacity": Capacity(**values["capacity"])})

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the network's parts, see ``Network``."""
        return ("experts", "router") if self.num_experts > 1 else ("backbone",)

    @property
    def num_exits(self) -> int:
        """The main one alone."""
        return 1

    @property
    def size(self) -> Size:
        """The named size, with what is given in its place."""
        named = SIZES[self.name]
        given = (self.image_size, self.patch, self.layers, self.width, self.hidden, self.heads)
        return Size(*(own or usual for own, usual in zip(given, named, strict=True)))

    @property
    def moe_blocks(self) -> tuple[int, ...]:
        """The numbers of the blocks that are mixtures.

        Raises:
            UserError: if there is no such placement.
        """
        return _moe_blocks(self.placement, self.size.layers) if self.num_experts > 1 else ()

    def dense(self) -> Self:
        """The dense network of the same size, which costs are compared with."""
        return self._replace(num_experts=1, top_k=1)

    def without_padding(self) -> Self:
        """The same network, dispatched in blocks of one token: padding is no cost of a network."""
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
        backbone = VisionTransformer(self, in_channels, num_classes, rngs=rngs)
        router = None
        if self.num_experts > 1:
            features = {name: x.in_features for name, x in number_layers(backbone).items()}
            router = LayerRouters(features, self.num_experts, router=TokenRouter, rngs=rngs)
        return Model(
            Normalize(self.mean, self.std),
            backbone,
            router,
            num_experts=self.num_experts,
            top_k=self.top_k,
            gate=self.gate,
            strategy=self.dispatch,
            block_size=self.block_size,
            remat=self.remat,
            capacity=self.capacity,
        )

    def check(self, in_channels: int) -> None:
        """Raises UserError, naming the value, if this describes no network."""
        if self.name not in SIZES:
            near = difflib.get_close_matches(self.name, SIZES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"model.name={self.name!r} is unknown; {hint}valid names: {', '.join(SIZES)}"
            )
        for name in ("num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.num_experts > MOST_EXPERTS:
            raise UserError(f"model.num_experts={self.num_experts} must be at most {MOST_EXPERTS}")
        self._check_size()
        _ = self.moe_blocks
        if self.num_experts == 1 and self.top_k != 1:
            raise UserError(f"model.top_k={self.top_k} must be 1: model.num_experts=1 is dense")
        if self.pool not in POOLS:
            raise UserError(
                f"model.pool={self.pool!r} is unknown; choose one of {', '.join(POOLS)}"
            )
        for name in ("dropout", "attention_dropout", "expert_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must lie in [0, 1)")
        for name in ("training", "evaluation"):
            if (ratio := getattr(self.capacity, name)) < 0:
                raise UserError(
                    f"model.capacity.{name}={ratio} must be positive, or 0 to drop nothing"
                )
        if self.capacity.images < 1:
            raise UserError(f"model.capacity.images={self.capacity.images} must be at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, in_channels):
                raise UserError(
                    f"model.{name} has {len(values)} values; the images have {in_channels} "
                    f"channels: give 1 or {in_channels}"
                )
        if min(self.std) <= 0:
            raise UserError(f"model.std={tuple(self.std)} must be positive")
        for name, value in (("dtype", self.dtype), ("param_dtype", self.param_dtype)):
            if value not in ("float32", "bfloat16"):
                raise UserError(f"model.{name}={value!r} must be 'float32' or 'bfloat16'")

    def _check_size(self) -> None:
        for name in ("image_size", "patch", "layers", "width", "hidden", "heads", "representation"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"model.{name}={getattr(self, name)} must be positive, or 0 for the usual one"
                )
        size = self.size
        if size.image % size.patch:
            raise UserError(
                f"model.patch={size.patch} does not divide the images' side, {size.image}: give "
                f"a divisor such as {max(n for n in range(1, size.patch) if size.image % n == 0)}"
            )
        if size.width % size.heads:
            raise UserError(f"model.heads={size.heads} does not divide model.width={size.width}")


def _moe_blocks(placement: str, layers: int) -> tuple[int, ...]:
    every_2 = range(1, layers, 2)
    if match := re.fullmatch(r"every_([1-9]\d{0,3})", placement):
        step = int(match[1])
        blocks = range(step - 1, layers, step)
    elif match := re.fullmatch(r"last_([1-9]\d{0,3})", placement):
        blocks = every_2[-int(match[1]) :]
        if int(match[1]) > len(every_2):
            blocks = ()
    elif re.fullmatch(r"\d{1,4}(,\d{1,4})*", placement):
        blocks = sorted({int(number) for number in placement.split(",")})
    else:
        raise UserError(
            f"model.placement={placement!r} is unknown; give every_2, last_2, or the numbers of "
            "blocks such as 5,7"
        )
    if not blocks or max(blocks) >= layers:
        raise UserError(
            f"model.placement={placement!r} names blocks that do not exist: there are {layers}, "
            f"from 0 to {layers - 1}, and every_2 has {len(every_2)} of them"
        )
    return tuple(blocks)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), the MLP dense or of experts."""

    def __init__(
        self, settings: ViT, site: int, is_moe: bool, types: Mapping[str, Any], rngs: nnx.Rngs
    ) -> None:
        size, more = settings.size, {**types, "rngs": rngs}
        self.norm1 = LayerNorm(size.width, param_dtype=types["param_dtype"])
        self.attention = Attention(
            size.width, size.heads, dropout=settings.attention_dropout, site=site, **more
        )
        self.norm2 = LayerNorm(size.width, param_dtype=types["param_dtype"])
        if is_moe:
            self.mlp = ExpertMlp(
                *(size.width, size.hidden),
                num_experts=settings.num_experts,
                identical=settings.identical_experts,
                dropout=settings.expert_dropout,
                site=site + 2,
                **more,
            )
        else:
            rate = settings.dropout
            self.mlp = Mlp(size.width, size.hidden, dropout=rate, site=site + 2, **more)
        self.dropout, self.site = settings.dropout, site + 1

    def __call__(self, x: Array, context: Context) -> Array:
        """Tokens [B, T, D] of the same shape."""
        y = self.attention(self.norm1(x), context)
        x = x + dropout(y, self.dropout, context.keys, self.site)
        return x + self.mlp(self.norm2(x), context)


class VisionTransformer(nnx.Module):
    """Normalised images -> logits.

    Attributes:
        num_tokens: of an image, the class token included: decisions of each MoE block.
        grid: patches of an image in a column and in a row.
        has_class_token: whether token 0 is not of a patch.
        is_stochastic: whether anything is drawn in training.
    """

    def __init__(
        self, settings: ViT, in_channels: int, num_classes: int, *, rngs: nnx.Rngs
    ) -> None:
        size = settings.size
        types = {
            "dtype": jnp.dtype(settings.dtype),
            "param_dtype": jnp.dtype(settings.param_dtype),
        }
        side = size.image // size.patch
        self.grid, self.patch, self.image_size = (side, side), size.patch, size.image
        self.has_class_token = settings.pool == "token"
        self.num_tokens = side * side + self.has_class_token
        self.dropout = settings.dropout
        self.is_stochastic = bool(
            settings.dropout or settings.attention_dropout or settings.expert_dropout
        )
        param_dtype = types["param_dtype"]
        patch = (size.patch, size.patch, in_channels)
        self.embedding = Dense(patch, (size.width,), **types, rngs=rngs)
        shape, std = (*patch, size.width), 1 / math.sqrt(math.prod(patch))
        self.embedding.kernel[...] = normal_init(rngs.params(), shape, std, param_dtype)
        if self.has_class_token:
            self.cls = nnx.Param(jnp.zeros(size.width, param_dtype))
        self.positions = nnx.Param(
            normal_init(rngs.params(), (self.num_tokens, size.width), 0.02, param_dtype)
        )
        names = []
        for i in range(size.layers):
            site = 1 + i * _SITES
            setattr(self, f"block{i}", Block(settings, site, i in settings.moe_blocks, types, rngs))
            names.append(f"block{i}")
        self.names = tuple(names)
        self.norm = LayerNorm(size.width, param_dtype=param_dtype)
        features = size.width
        if settings.representation:
            features = settings.representation
            self.representation = Dense((size.width,), (features,), **types, rngs=rngs)
        self.has_representation = bool(settings.representation)
        self.head = Linear(features, num_classes, std=0.0, param_dtype=param_dtype, rngs=rngs)

    def check_images(self, height: int, width: int) -> None:
        """Raises UserError if the images are of another size than the positions."""
        if (height, width) != (self.image_size, self.image_size):
            raise UserError(
                f"model.image_size={self.image_size}, but the images are {height}x{width}: "
                "set it to their side, or data.image_size to that of the network"
            )

    def tokens_of(self, images: Array) -> Array:
        """Normalised images [B, H, W, C] -> embedded tokens with their positions [B, T, D].

        Raises:
            UserError: if the images are of another size than the positions.
        """
        batch, *shape, channels = images.shape
        self.check_images(*shape)
        (rows, columns), patch = self.grid, self.patch
        x = images.reshape(batch, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.embedding(x.reshape(batch, rows * columns, patch, patch, channels))
        if self.has_class_token:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (batch, 1, x.shape[-1]))
            x = jnp.concatenate([cls, x], axis=1)
        return x + self.positions[...].astype(x.dtype)

    def __call__(self, images: Array, context: Context) -> Array:
        """Normalised images [B, H, W, C] -> logits float32 [B, classes]."""
        x = dropout(self.tokens_of(images), self.dropout, context.keys, 0)
        for name in self.names:
            x = run_layer(getattr(self, name), x, context)
        x = self.norm(x)
        x = x[:, 0] if self.has_class_token else jnp.mean(x, axis=1)
        if self.has_representation:
            x = jnp.tanh(self.representation(x))
        return self.head(x)
