"""A whole network (normalisation, router, backbone), and its functional form.

Everything that trains, attacks or measures a network uses the functional form: pure functions of
parameters and statistics, each a tree with two branches, ``router`` and ``experts``. ``experts``
is everything that is not the router: the backbone, its expert kernels, the head. A dense network's
``router`` branch is an empty tree.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax import dispatch
from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import Context
from advmoe_jax.models.router import Router, Routing, choose

Array = jax.Array
Tree = dict[str, Any]


class Output(NamedTuple):
    """What a network says of a batch: logits float32 [B, classes]; routing, None when dense."""

    logits: Array
    routing: Routing | None


class Normalize(nnx.Module):
    """(images - mean) / std per channel, so that attacks may live in pixel space [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] in [0, 1] -> the same shape, about zero mean and unit variance."""
        return (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)


class Model(nnx.Module):
    """Images float32 [B, H, W, C] in [0, 1] -> ``Output``.

    Args:
        normalize: first layer.
        backbone: maps normalised images and a ``Context`` to logits.
        router: None for a dense network.
        top_k: experts per image.
        gate: ``straight_through`` or ``softmax``, see ``router.choose``.
        block_size: samples per block of the dispatch.
    """

    def __init__(
        self,
        normalize: Normalize,
        backbone: nnx.Module,
        router: Router | None,
        *,
        num_experts: int,
        top_k: int = 1,
        gate: str = "straight_through",
        block_size: int = 16,
    ) -> None:
        if block_size < 1:
            raise UserError(f"model.block_size={block_size} must be at least 1")
        if router is not None:
            choose(jnp.zeros((1, num_experts)), top_k, gate)  # a wrong setting speaks up now
        self.normalize, self.backbone, self.router = normalize, backbone, router
        self.num_experts, self.top_k, self.gate = num_experts, top_k, gate
        self.block_size = block_size

    def scores(
        self, images: Array, *, train: bool = False, axis_name: str | None = None
    ) -> Array | None:
        """The router's scores float32 [B, N]; None for a dense network."""
        if self.router is None:
            return None
        return self.router(self.normalize(images), Context(train, axis_name))

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        routing: Routing | None = None,
        axis_name: str | None = None,
    ) -> Output:
        """Classifies; ``routing``, if given, is followed and the router is not run.

        The straight-through gradient is for training a router. In inference mode the gate has its
        true derivative: to an attacker the surrogate is noise that hides the loss's own gradient.
        """
        x = self.normalize(images)
        if self.router is None:
            return Output(self.backbone(x, Context(train, axis_name)), None)
        if routing is None:
            scores = self.scores(images, train=train, axis_name=axis_name)
            routing = choose(scores, self.top_k, self.gate, surrogate=train)
        plan = dispatch.plan(routing.indices, self.num_experts, self.block_size)
        is_sorted = routing.indices.shape[1] == 1
        context = Context(train, axis_name, plan, routing.weights, is_sorted)
        if not is_sorted:
            return Output(self.backbone(x, context), routing)
        rows = self.backbone(dispatch.gather(x, plan), context)
        return Output(rows[plan.position[:, 0]], routing)


class Network:
    """The functional form of a model; hashable by identity, holds no arrays.

    ``params`` and ``stats`` below are trees ``{"router": ..., "experts": ...}``; ``images`` are
    float32 [B, H, W, C] in [0, 1].
    """

    def __init__(self, model: Model) -> None:
        self._graph, _, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
        self.num_experts = model.num_experts
        self.is_moe = model.router is not None
        self._top_k, self._gate = model.top_k, model.gate

    def apply(
        self,
        params: Tree,
        stats: Tree,
        images: Array,
        *,
        train: bool = False,
        routing: Routing | None = None,
        axis_name: str | None = None,
    ) -> tuple[Output, Tree]:
        """Logits and routing, and the statistics after the pass (unchanged unless ``train``).

        Args:
            params: parameters.
            stats: BatchNorm statistics.
            images: the batch.
            train: normalise with the batch's statistics and update the running ones.
            routing: followed instead of the router's, which is then not run.
            axis_name: mapped axis over which batch statistics are synchronised.
        """
        model = self._merge(params, stats)
        output = model(images, train=train, routing=routing, axis_name=axis_name)
        return output, _branches(nnx.state(model, nnx.BatchStat))

    def scores(
        self,
        params: Tree,
        stats: Tree,
        images: Array,
        *,
        train: bool = False,
        axis_name: str | None = None,
    ) -> tuple[Array | None, Tree]:
        """The router alone: scores float32 [B, N] (None when dense), and statistics after."""
        model = self._merge(params, stats)
        scores = model.scores(images, train=train, axis_name=axis_name)
        return scores, _branches(nnx.state(model, nnx.BatchStat))

    def choose(self, scores: Array | None) -> Routing | None:
        """The routing that follows from scores [B, N], straight-through gradient included.

        None when dense.
        """
        return choose(scores, self._top_k, self._gate) if self.is_moe else None

    def _merge(self, params: Tree, stats: Tree) -> Model:
        # Without the copy, statistics updated under an inner grad would leak its tracers.
        return nnx.merge(self._graph, _state(params), _state(stats), copy=True)


def functional(model: Model) -> tuple[Network, Tree, Tree]:
    """Splits a model into pure functions and its arrays: ``(network, params, stats)``."""
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return Network(model), _branches(params), _branches(stats)


def _branches(state: nnx.State) -> Tree:
    tree = nnx.to_pure_dict(state)
    return {"router": tree.get("router", {}), "experts": tree.get("backbone", {})}


def _state(branches: Tree) -> nnx.State:
    names = {"router": "router", "experts": "backbone"}
    return nnx.State({names[k]: v for k, v in branches.items() if v})
