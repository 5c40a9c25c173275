"""A whole network (normalisation, router, backbone), and its functional form.

Everything that trains, attacks or measures a network uses the functional form: pure functions of
parameters and statistics. Both are dicts of named parts, and a network lists its parts:

- ``router`` and ``experts`` of a mixture; ``experts`` is everything that is not the router;
- ``backbone`` of a network without a router;
- ``scores`` beside ``backbone`` of a Sparse network: the channel scores that are chosen by;
- ``exits`` beside either of a multi-exit network: the heads of its side exits, and in its
  statistics the thresholds of their entropies;
- whatever else a backbone names in its attribute ``parts``, from the name of a child to a part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from flax import traverse_util

from advmoe_jax.errors import UserError
from advmoe_jax.models.dense_layers import Dropout
from advmoe_jax.models.layers import Context, Heads
from advmoe_jax.models.moe import ExpertParam
from advmoe_jax.models.output import Normalize, Output
from advmoe_jax.models.router import LayerRouters, LayerRoutes, Router
from advmoe_jax.models.sparse import ChannelScore
from advmoe_jax.routing import capacity as capacity_lib
from advmoe_jax.routing import dispatch
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import Routing, choose
from advmoe_jax.types import Array, Images, Logits, Tree

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
        router: Router | LayerRouters | None,
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
        axis_name: str | None = None,
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
        axis_name: str | None = None,
    ) -> Output:
        """Classifies; see ``Network.apply``."""
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
        plan = self._plan(indices)
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
        context = Context()
        if routing is not None:
            indices, weights = routing.indices[:, 0], routing.weights[:, 0]
            context = context._replace(plan=self._plan(indices), weights=weights)
        x = self.normalize(x) if number == 0 else x
        return self.backbone.stage(number, x, context, answers=answers)

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
            routing = capacity_lib.drop(routing, ratio, self.capacity) if ratio else routing
            return routing if exchange is None else exchange(routing)

        of_router = Context(train_router, context.axis_name)
        routes = LayerRoutes(self.router, of_router, decide, routing, noise)

        def route(number: int, x: Array) -> tuple[dispatch.Plan | dispatch.Every, Array]:
            here = routes.follow(number, x)
            k = here.indices.shape[-1]
            return self._plan(here.indices.reshape(-1, k)), here.weights.reshape(-1, k)

        answers = self.backbone(self.normalize(images), context._replace(route=route))
        return _output(answers, routes.taken)

    def _plan(self, indices: Array) -> dispatch.Plan | dispatch.Every:
        if dispatch.choose_strategy(self.strategy) == "every":
            return dispatch.Every(indices)
        per = "token" if hasattr(self.backbone, "num_tokens") else "image"
        block = self.block_size or dispatch.choose_block(indices.size, self.num_experts, per)
        return dispatch.plan(indices, self.num_experts, block)


def _output(answers: Logits | Heads, routing: Routing | None) -> Output:
    if isinstance(answers, Heads):
        return Output(answers.logits, routing, answers.exits)
    return Output(answers, routing)


@jax.tree_util.register_static
class Network:
    """The functional form of a model; holds no arrays.

    Networks of one structure are equal, whatever their parameters and the shapes of these, and a
    network is static wherever JAX looks at it: a function jitted for one serves the others.

    ``params`` and ``stats`` below are dicts with an entry for each of ``parts``; ``images`` are
    float32 [B, H, W, C] in [0, 1].

    Attributes:
        parts: names of the parts, such as ``("router", "experts")``.
        decisions: names of an image's decisions; none in a network without a router.
        num_experts: to choose among.
        top_k: experts per decision.
        gate: see ``routing.choose``.
        num_routers: layers that are routed by themselves, each with as many decisions; 1 if all
            follow one route, 0 without a router.
        capacity: places of the experts.
        is_stochastic: whether anything but routes is drawn in training.
        stacked: a tree like ``params`` of booleans: whether the first axis counts the experts.
        num_exits: the main one counted; 1 in a network without side exits.
    """

    def __init__(self, model: Model) -> None:
        self._graph, _ = nnx.split(model, ...)
        self.stacked = _by_part(
            model, nnx.Param, lambda variable: isinstance(variable, ExpertParam)
        )
        self.parts = tuple(self.stacked)
        self.num_experts, self.top_k, self.gate = model.num_experts, model.top_k, model.gate
        self.decisions, self.capacity = model.decisions, model.capacity
        self.num_routers = len(model.router.names) if model.is_routed_by_layer else int(self.is_moe)
        self.num_exits = getattr(model.backbone, "num_exits", 1)
        self.is_stochastic = getattr(model.backbone, "is_stochastic", False) or any(
            isinstance(x, Dropout) for _, x in nnx.iter_graph(model.backbone)
        )

    @property
    def is_moe(self) -> bool:
        """Whether there is a router."""
        return "router" in self.parts

    @property
    def score_shape(self) -> tuple[int, ...]:
        """Of one image's scores, (decisions, experts); empty without a router."""
        return (len(self.decisions), self.num_experts) if self.is_moe else ()

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
        keys: Array | None = None,
        exchange: Callable[[Routing], Routing] | None = None,
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
            routing: followed instead of the router's, which is then not run; or its ``indices``
                alone, which the router weighs.
            noise: added to the scores when experts are chosen, float32 [B, *score_shape].
            keys: one per image, of what is drawn if ``train``; None: nothing is.
            exchange: makes of what the router decided, layer by layer, what is followed.
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
            keys=keys,
            exchange=exchange,
            axis_name=axis_name,
        )
        return output, _by_part(model, nnx.BatchStat)

    def stage(
        self,
        params: Tree,
        stats: Tree,
        number: int,
        x: Array,
        *,
        routing: Routing | None = None,
        answers: bool = True,
    ) -> tuple[Array, Logits | None]:
        """What lies between an exit and the next, in inference mode.

        Args:
            params: parameters.
            stats: statistics.
            number: of the stage, from 0, one for each exit.
            x: images in stage 0, else the features that the stage before gave.
            routing: of the images of ``x``; a mixture needs it.
            answers: whether the head of a side exit runs.

        Returns:
            The features behind the stage, and the exit's logits.

        Raises:
            UserError: if every layer of a mixture is routed by itself.
        """
        model = self._merge(params, stats)
        if model.is_routed_by_layer:
            raise UserError(
                "images leave a mixture early only if it has one route per image: set "
                "model.router.scope='global'"
            )
        return model.stage(number, x, routing=routing, answers=answers)

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
        return routing, _by_part(model, nnx.BatchStat)

    def _merge(self, params: Tree, stats: Tree) -> Model:
        flat = {}
        for tree in (params, stats):
            for part, values in tree.items():
                module = "router" if part == "router" else "backbone"
                flat |= traverse_util.flatten_dict({module: values})
        # Without the copy, statistics updated under an inner grad would leak its tracers.
        return nnx.merge(self._graph, nnx.State(traverse_util.unflatten_dict(flat)), copy=True)


def functional(model: Model) -> tuple[Network, Tree, Tree]:
    """Splits a model into pure functions and its arrays: ``(network, params, stats)``."""
    return Network(model), _by_part(model, nnx.Param), _by_part(model, nnx.BatchStat)


def _by_part(
    model: Model, kind: type, value_of: Callable[[Any], Any] = lambda variable: variable.get_value()
) -> Tree:
    """What ``value_of`` says of every variable of a kind, as a dict of the network's parts."""
    flat: dict[str, dict[tuple[Any, ...], Any]] = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        of_part = flat.setdefault(model.part_of(path, type(variable)), {})
        if isinstance(variable, kind):
            of_part[path[1:]] = value_of(variable)
    return {part: traverse_util.unflatten_dict(values) for part, values in flat.items()}
