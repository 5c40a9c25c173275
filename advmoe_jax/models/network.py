"""A whole network (normalisation, router, backbone), and its functional form.

Everything that trains, attacks or measures a network uses the functional form: pure functions of
parameters and statistics, each a tree with two branches, ``router`` and ``experts``. ``experts``
is everything that is not the router: the backbone, its expert kernels, the head. A dense network's
``router`` branch is an empty tree; a Sparse network's holds what chooses there: channel scores.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import Context
from advmoe_jax.models.router import LayerRouters, Router
from advmoe_jax.models.sparse import ChannelScore
from advmoe_jax.routing import dispatch
from advmoe_jax.routing.choice import Routing, choose

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
        router: of the whole network, or of each of its MoE layers; None for a dense network.
        top_k: experts per image.
        gate: ``straight_through`` or ``softmax``, see ``router.choose``.
        strategy: of the dispatch, one of ``dispatch.STRATEGIES``.
        block_size: samples per block of the dispatch; 0: chosen by the size of the batch.
        remat: compute activations again for the gradient instead of keeping them.
    """

    def __init__(
        self,
        normalize: Normalize,
        backbone: nnx.Module,
        router: Router | LayerRouters | None,
        *,
        num_experts: int,
        top_k: int = 1,
        gate: str = "straight_through",
        strategy: str = "auto",
        block_size: int = 0,
        remat: bool = False,
    ) -> None:
        if block_size < 0:
            raise UserError(f"model.block_size={block_size} must be positive, or 0 to choose it")
        if strategy not in dispatch.STRATEGIES:
            raise UserError(
                f"model.dispatch={strategy!r} is no strategy; "
                f"choose one of {', '.join(dispatch.STRATEGIES)}"
            )
        if router is not None:
            choose(jnp.zeros((1, num_experts)), top_k, gate)  # a wrong setting speaks up now
        self.normalize, self.backbone, self.router = normalize, backbone, router
        self.num_experts, self.top_k, self.gate = num_experts, top_k, gate
        self.strategy, self.block_size, self.remat = strategy, block_size, remat
        if remat and self.scope == "per_layer":
            raise UserError(
                "model.remat=True needs one route per image; set model.router.scope='global'"
            )

    @property
    def scope(self) -> str | None:
        """``global`` or ``per_layer``; None for a dense network."""
        if self.router is None:
            return None
        return "per_layer" if isinstance(self.router, LayerRouters) else "global"

    def route(
        self,
        images: Array,
        *,
        train: bool = False,
        surrogate: bool | None = None,
        noise: Array | None = None,
        axis_name: str | None = None,
    ) -> Routing | None:
        """Where the images would go; None for a dense network.

        A global router runs alone; routers per layer need the features, so the whole network runs.
        ``train`` is the router's mode; the backbone is in inference mode.
        """
        if self.scope != "global":
            return self(
                images, train_router=train, surrogate=surrogate, noise=noise, axis_name=axis_name
            ).routing
        scores = self.router(self.normalize(images), Context(train, axis_name))
        surrogate = train if surrogate is None else surrogate
        return choose(scores, self.top_k, self.gate, surrogate, noise)

    def __call__(
        self,
        images: Array,
        *,
        train: bool = False,
        train_router: bool | None = None,
        surrogate: bool | None = None,
        routing: Routing | None = None,
        noise: Array | None = None,
        axis_name: str | None = None,
    ) -> Output:
        """Classifies; see ``Network.apply``."""
        context = Context(train, axis_name, remat=self.remat)
        train_router = train if train_router is None else train_router
        surrogate = train_router if surrogate is None else surrogate
        if self.router is None:
            context = context._replace(surrogate=surrogate)
            return Output(self.backbone(self.normalize(images), context), None)
        if self.scope == "per_layer":
            return self._route_each_layer(images, context, train_router, surrogate, routing, noise)
        # Weights that are all one need no product after every convolution.
        is_unit = routing is None and self.gate == "straight_through" and not surrogate
        if routing is None:
            routing = self.route(
                images, train=train_router, surrogate=surrogate, noise=noise, axis_name=axis_name
            )
        plan = self._plan(routing.indices)
        context = context._replace(plan=plan, weights=routing.weights)
        x = self.normalize(images)
        if routing.indices.shape[1] > 1 or isinstance(plan, dispatch.Every):
            return Output(self.backbone(x, context), routing)
        rows = dispatch.gather(x, plan)
        context = context._replace(weights=None) if is_unit else context
        if train:  # the images share the batch's statistics: they go from layer to layer together
            rows = self.backbone(rows, context._replace(is_sorted=True))
        else:
            rows = self._block_by_block(rows, context)
        return Output(rows[plan.position[:, 0]], routing)

    def _block_by_block(self, rows: Array, context: Context) -> Array:
        """One loop around the whole backbone: a block's activations stay in the cache."""

        def of_block(expert: Array, block: Array, weights: Array | None = None) -> Array:
            return self.backbone(block, context._replace(expert=expert, weights=weights))

        weights = ()
        if context.weights is not None:
            weights = (dispatch.row_weights(context.weights, context.plan),)
        return dispatch.map_blocks(of_block, context.plan, rows, *weights)

    def _route_each_layer(
        self,
        images: Array,
        context: Context,
        train_router: bool,
        surrogate: bool,
        routing: Routing | None,
        noise: Array | None,
    ) -> Output:
        followed: list[Routing | None] = [None] * len(self.router.names)
        of_router = Context(train_router, context.axis_name)

        def route(number: int, x: Array) -> tuple[dispatch.Plan | dispatch.Every, Array]:
            if routing is None:
                scores = self.router(number, x, of_router)
                added = None if noise is None else noise[:, number]
                here = choose(scores, self.top_k, self.gate, surrogate, added)
            else:
                here = Routing(*(part[:, number] for part in routing))
            followed[number] = here
            return self._plan(here.indices), here.weights

        logits = self.backbone(self.normalize(images), context._replace(route=route))
        if routing is None:
            routing = Routing(*(jnp.stack(part, axis=1) for part in zip(*followed, strict=True)))
        return Output(logits, routing)

    def _plan(self, indices: Array) -> dispatch.Plan | dispatch.Every:
        if dispatch.choose_strategy(self.strategy) == "every":
            return dispatch.Every(indices)
        block = self.block_size or dispatch.choose_block(indices.size, self.num_experts)
        return dispatch.plan(indices, self.num_experts, block)


class Network:
    """The functional form of a model; holds no arrays.

    Networks of one structure are equal, whatever their parameters and the shapes of these: a
    function jitted for one serves the others.

    ``params`` and ``stats`` below are trees ``{"router": ..., "experts": ...}``; ``images`` are
    float32 [B, H, W, C] in [0, 1].
    """

    def __init__(self, model: Model) -> None:
        self._graph, *_ = nnx.split(model, ChannelScore, nnx.Param, nnx.BatchStat)
        self.num_experts = model.num_experts
        self.is_moe = model.router is not None
        self.is_sparse = any(isinstance(x, ChannelScore) for _, x in nnx.iter_graph(model))
        self.scope, self.top_k, self.gate = model.scope, model.top_k, model.gate
        # Of one image's scores: (N,), or (L, N) if L layers have routers; () for a dense network.
        self.score_shape = (model.num_experts,) if self.is_moe else ()
        if self.scope == "per_layer":
            self.score_shape = (len(model.router.names), model.num_experts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._graph == other._graph

    def __hash__(self) -> int:
        return hash(self._graph)

    def apply(
        self,
        params: Tree,
        stats: Tree,
        images: Array,
        *,
        train: bool = False,
        train_router: bool | None = None,
        surrogate: bool | None = None,
        routing: Routing | None = None,
        noise: Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[Output, Tree]:
        """Logits and routing, and the statistics after the pass.

        Args:
            params: parameters.
            stats: BatchNorm statistics.
            images: the batch.
            train: normalise with the batch's statistics and update the running ones.
            train_router: the router's mode, if it is not the backbone's.
            surrogate: whether the straight-through gate, or a Sparse network's choice of channels,
                has its surrogate gradient; None: when the router is in training mode. It is there
                to train a router: to an attacker it is noise that hides the loss's own gradient.
            routing: followed instead of the router's, which is then not run.
            noise: added to the scores when experts are chosen, float32 [B, *score_shape].
            axis_name: mapped axis over which batch statistics are synchronised.
        """
        model = self._merge(params, stats)
        output = model(
            images,
            train=train,
            train_router=train_router,
            surrogate=surrogate,
            routing=routing,
            noise=noise,
            axis_name=axis_name,
        )
        return output, _branches(nnx.state(model, nnx.BatchStat))

    def route(
        self,
        params: Tree,
        stats: Tree,
        images: Array,
        *,
        train: bool = False,
        surrogate: bool | None = None,
        noise: Array | None = None,
        axis_name: str | None = None,
    ) -> tuple[Routing | None, Tree]:
        """Where the images would go (None when dense), and the statistics after.

        A global router runs alone; routers per layer need the features, so the whole network runs,
        in inference mode but for the routers if ``train``.
        """
        model = self._merge(params, stats)
        routing = model.route(
            images, train=train, surrogate=surrogate, noise=noise, axis_name=axis_name
        )
        return routing, _branches(nnx.state(model, nnx.BatchStat))

    def _merge(self, params: Tree, stats: Tree) -> Model:
        # Without the copy, statistics updated under an inner grad would leak its tracers.
        states = [*_states(params, self.is_moe), *_states(stats, self.is_moe)]
        return nnx.merge(self._graph, *states, copy=True)


def functional(model: Model) -> tuple[Network, Tree, Tree]:
    """Splits a model into pure functions and its arrays: ``(network, params, stats)``."""
    _, scores, params, stats = nnx.split(model, ChannelScore, nnx.Param, nnx.BatchStat)
    branches = _branches(params)
    if model.router is None:
        branches["router"] = nnx.to_pure_dict(scores).get("backbone", {})
    return Network(model), branches, _branches(stats)


def _branches(state: nnx.State) -> Tree:
    tree = nnx.to_pure_dict(state)
    return {"router": tree.get("router", {}), "experts": tree.get("backbone", {})}


def _states(branches: Tree, is_moe: bool) -> list[nnx.State]:
    names = {"router": "router" if is_moe else "backbone", "experts": "backbone"}
    return [nnx.State({names[branch]: tree}) for branch, tree in branches.items() if tree]
