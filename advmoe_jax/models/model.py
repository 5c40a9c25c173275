"""A network as a module: normalisation, router, backbone. ``network`` has its functional form."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import Context, Heads
from advmoe_jax.models.moe import ExpertParam
from advmoe_jax.models.output import Normalize, Output
from advmoe_jax.models.route_bounds import score_margins
from advmoe_jax.models.router import LayerRouters, LayerRoutes, LinearRouter, Router
from advmoe_jax.models.sparse import ChannelScore
from advmoe_jax.routing import capacity as capacity_lib
from advmoe_jax.routing import dispatch
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import Routing, choose
from advmoe_jax.routing.exchange import AnyPlan, Sharded
from advmoe_jax.types import Array, Axes, Images, Logits

# The one decision of a global router.
GLOBAL = ("image",)
DROPLESS = Capacity()


class Model(nnx.Module):
    """Images float32 [B, H, W, C] in [0, 1] -> ``Output``.

    Args:
        normalize: first layer.
        backbone: maps normalised images and a ``Context`` to logits, or to ``Heads``.
        router: of the whole network, or of each of its MoE layers; None for a dense network.
        top_k: experts per image.
        gate: ``straight_through`` or ``softmax``, see ``routing.choose``.
        strategy: of the dispatch, one of ``dispatch.STRATEGIES``.
        block_size: samples per block of the dispatch; 0: chosen by the size of the batch.
        remat: compute activations again for the gradient instead of keeping them.
        capacity: places of the experts, where every layer is routed by itself.
    """

    def __init__(
        self,
        normalize: Normalize,
        backbone: nnx.Module,
        router: Router | LinearRouter | LayerRouters | None,
        *,
        num_experts: int,
        top_k: int = 1,
        gate: str = "straight_through",
        strategy: str = "auto",
        block_size: int = 0,
        remat: bool = False,
        capacity: Capacity = DROPLESS,
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
        self.capacity = capacity
        if remat and self.is_routed_by_layer:
            raise UserError(
                "model.remat=True needs one route per image; set model.router.scope='global'"
            )

    @property
    def is_routed_by_layer(self) -> bool:
        """Whether every MoE layer has a router of its own."""
        return isinstance(self.router, LayerRouters)

    @property
    def decisions(self) -> tuple[str, ...]:
        """The names of an image's decisions; none in a dense network."""
        if not self.is_routed_by_layer:
            return () if self.router is None else GLOBAL
        tokens = getattr(self.backbone, "num_tokens", 0)
        if not tokens:
            return self.router.names
        return tuple(f"{name}_token{i}" for name in self.router.names for i in range(tokens))

    def part_of(self, path: Sequence[Any], kind: type) -> str:
        """The part of the network that a variable of that kind at that path belongs to."""
        if path[0] == "router":
            return "router"
        if issubclass(kind, ChannelScore):
            return "scores"
        named = {"exits": "exits", **getattr(self.backbone, "parts", {})}
        rest = "backbone" if self.router is None else "experts"
        return named.get(path[1], rest)

    def route(
        self,
        images: Images,
        *,
        train: bool = False,
        surrogate: bool | None = None,
        noise: Array | None = None,
        indices: Array | None = None,
        axis_name: Axes | None = None,
    ) -> Routing | None:
        """Where the images would go; None for a dense network.

        A global router runs alone; routers per layer need the features, so the whole network runs.
        ``train`` is the router's mode; the backbone is in inference mode. ``indices``: the experts
        to take.
        """
        if self.router is None or self.is_routed_by_layer:
            given = None if indices is None else Routing(indices)
            passes = {"train_router": train, "surrogate": surrogate, "noise": noise}
            return self(images, routing=given, axis_name=axis_name, **passes).routing
        scores = self.router(self.normalize(images), Context(train, axis_name))
        surrogate = train if surrogate is None else surrogate
        return choose(scores[:, None], self.top_k, self.gate, surrogate, noise, indices)

    def route_margins(self, low: Images, high: Images) -> Array:
        """Lower bounds of score i minus score j; see ``Network.route_margins``."""
        return score_margins(self.router, self.normalize(low), self.normalize(high))

    def __call__(
        self,
        images: Images,
        *,
        train: bool = False,
        train_router: bool | None = None,
        surrogate: bool | None = None,
        routing: Routing | None = None,
        noise: Array | None = None,
        keys: Array | None = None,
        exchange: Callable[[Routing], Routing] | None = None,
        axis_name: Axes | None = None,
    ) -> Output:
        """Classifies; see ``Network.apply``."""
        self._check(routing, noise, images.shape[0])
        context = Context(train, axis_name, remat=self.remat, keys=keys if train else None)
        train_router = train if train_router is None else train_router
        surrogate = train_router if surrogate is None else surrogate
        if self.router is None:
            context = context._replace(surrogate=surrogate)
            return _output(self.backbone(self.normalize(images), context), None)
        if self.is_routed_by_layer:
            modes = (train_router, surrogate)
            return self._route_each_layer(images, context, *modes, routing, noise, exchange)
        # Weights that are all one need no product after every convolution.
        is_unit = self.gate == "straight_through" and not (surrogate or routing or exchange)
        if routing is None or routing.weights is None:
            passes = {"train": train_router, "surrogate": surrogate, "noise": noise}
            given = None if routing is None else routing.indices
            routing = self.route(images, indices=given, axis_name=axis_name, **passes)
            routing = routing if exchange is None else exchange(routing)
        indices, weights = routing.indices[:, 0], routing.weights[:, 0]
        plan = self._plan(indices, train)
        context = context._replace(plan=plan, weights=weights)
        x = self.normalize(images)
        if indices.shape[1] > 1 or isinstance(plan, dispatch.Every):
            return _output(self.backbone(x, context), routing)
        rows = dispatch.gather(x, plan)
        context = context._replace(weights=None) if is_unit else context
        if train:  # the images share the batch's statistics: they go from layer to layer together
            rows = self.backbone(rows, context._replace(is_sorted=True))
        else:
            rows = self._block_by_block(rows, context)
        return _output(jax.tree.map(lambda x: x[plan.position[:, 0]], rows), routing)

    def stage(
        self, number: int, x: Array, *, routing: Routing | None = None, answers: bool = True
    ) -> tuple[Array, Logits | None]:
        """One stage in inference mode; see ``Network.stage``."""
        if routing is None and self.router is not None:
            raise UserError("a stage of a mixture needs the routing of its images: give routing")
        self._check(routing, None, x.shape[0])
        context = Context()
        if routing is not None:
            indices, weights = routing.indices[:, 0], routing.weights[:, 0]
            context = context._replace(plan=self._plan(indices), weights=weights)
        x = self.normalize(x) if number == 0 else x
        return self.backbone.stage(number, x, context, answers=answers)

    def _check(self, routing: Routing | None, noise: Array | None, images: int) -> None:
        """Raises UserError for a routing, or noise, that is not of these images and experts."""
        if self.router is None:
            return
        shape = images, len(self.decisions)
        if routing is not None and routing.indices.shape[:2] != shape:
            raise UserError(
                f"the routing's indices are {routing.indices.shape}: {images} images with "
                f"{shape[1]} decisions each need {shape} and a choice or more"
            )
        if routing is not None and _are_known(routing.indices):
            chosen = np.asarray(routing.indices)
            if chosen.size and not (chosen.min() >= 0 and chosen.max() < self.num_experts):
                raise UserError(
                    f"the routing names experts {chosen.min()} to {chosen.max()}; there are 0 to "
                    f"{self.num_experts - 1}"
                )
        if noise is not None and noise.shape != (*shape, self.num_experts):
            raise UserError(f"noise is {noise.shape}; it must be {(*shape, self.num_experts)}")

    def _block_by_block(self, rows: Array, context: Context) -> Any:
        """One loop around the whole backbone: a block's activations stay in the cache."""

        def of_block(expert: Array, block: Array, weights: Array | None = None) -> Any:
            return self.backbone(block, context._replace(expert=expert, weights=weights))

        weights = ()
        if context.weights is not None:
            weights = (dispatch.row_weights(context.weights, context.plan),)
        return dispatch.map_blocks(of_block, context.plan, rows, *weights)

    def _route_each_layer(
        self,
        images: Images,
        context: Context,
        train_router: bool,
        surrogate: bool,
        routing: Routing | None,
        noise: Array | None,
        exchange: Callable[[Routing], Routing] | None,
    ) -> Output:
        training = context.train or train_router
        ratio = self.capacity.training if training else self.capacity.evaluation

        def decide(scores: Array, noise: Array | None, indices: Array | None) -> Routing:
            routing = choose(scores, self.top_k, self.gate, surrogate, noise, indices)
            routing = routing if exchange is None else exchange(routing)
            return capacity_lib.drop(routing, ratio, self.capacity) if ratio else routing

        of_router = Context(train_router, context.axis_name)
        routes = LayerRoutes(self.router, of_router, decide, routing, noise)

        def route(number: int, x: Array) -> tuple[AnyPlan, Array]:
            here = routes.follow(number, x)
            k = here.indices.shape[-1]
            return self._plan(here.indices.reshape(-1, k), context.train), here.weights.reshape(
                -1, k
            )

        answers = self.backbone(self.normalize(images), context._replace(route=route))
        return _output(answers, routes.taken)

    def _plan(self, indices: Array, train: bool = False) -> AnyPlan:
        per = "image in training" if train else "image"
        per = "token" if hasattr(self.backbone, "num_tokens") else per
        how = {"strategy": self.strategy, "block_size": self.block_size, "per": per}
        # Inside a shard_map over the experts' axis the parameters are a device's own experts.
        stacked = (p for _, p in nnx.iter_graph(self.backbone) if isinstance(p, ExpertParam))
        held = min((p.shape[0] for p in stacked), default=self.num_experts)
        if held < self.num_experts:
            return Sharded(indices, held, partial(dispatch.arrange, **how))
        return dispatch.arrange(indices, self.num_experts, **how)


def _are_known(indices: Array) -> bool:
    """Whether there are values to look at, here."""
    is_traced = isinstance(indices, jax.core.Tracer)
    return not is_traced and getattr(indices, "is_fully_addressable", True)


def _output(answers: Logits | Heads, routing: Routing | None) -> Output:
    if isinstance(answers, Heads):
        return Output(answers.logits, routing, answers.exits)
    return Output(answers, routing)
