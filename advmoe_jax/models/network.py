"""The functional form of a whole network (``models.model``).

Everything that trains, attacks or measures a network uses the functional form: pure functions of
parameters and statistics. Both are dicts of named parts, and a network lists its parts:

- ``router`` and ``experts`` of a mixture; ``experts`` is everything that is not the router;
- ``backbone`` of a network without a router;
- ``scores`` beside ``backbone`` of a Sparse network: the channel scores that are chosen by;
- ``exits`` beside either of a multi-exit network: the heads of its side exits, and in its
  statistics the thresholds of their entropies;
- whatever else a backbone names in its attribute ``parts``, from the name of a child to a part.
"""

from collections.abc import Callable
from typing import Any

import flax.nnx as nnx
import jax
from flax import traverse_util
from jaxtyping import Float

from advmoe_jax.errors import UserError
from advmoe_jax.models.dense_layers import Dropout
from advmoe_jax.models.model import Model
from advmoe_jax.models.moe import ExpertParam
from advmoe_jax.models.output import Output
from advmoe_jax.models.route_bounds import has_bounds
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Axes, Images, Logits, Tree


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
        has_route_bounds: whether ``route_margins`` can be had.
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
        self.has_route_bounds = has_bounds(model.router)
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

    @property
    def expert_parameters(self) -> tuple[str, ...]:
        """Names, such as ``block1/mlp/dense1/kernel``, of parameters stacked over the experts."""
        return tuple(
            "/".join(map(str, path))
            for part in self.stacked.values()
            for path, is_stacked in traverse_util.flatten_dict(part).items()
            if is_stacked
        )

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
        axis_name: Axes | None = None,
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
        axis_name: Axes | None = None,
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

    def route_margins(
        self, params: Tree, stats: Tree, low: Images, high: Images
    ) -> Float[Array, "batch experts experts"]:
        """What the router's scores cannot be moved beyond: lower bounds of score i minus score j.

        Args:
            params: parameters.
            stats: statistics.
            low: the least value of every pixel.
            high: the largest.

        Raises:
            UserError: if every layer is routed by itself.
        """
        return self._merge(params, stats).route_margins(low, high)

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
