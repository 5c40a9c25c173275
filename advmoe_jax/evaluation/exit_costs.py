"""What leaving at each exit of a multi-exit network costs."""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax

from advmoe_jax.evaluation.cost import count_macs
from advmoe_jax.models.network import functional
from advmoe_jax.models.registry import Architecture

_MEBI = 2**20


class ExitCosts(NamedTuple):
    """Of an image that leaves at each exit, the main one last.

    Attributes:
        params: that are read up to the exit, the heads of earlier exits left out; of a mixture
            those of all experts, and none of the router.
        own: multiply-accumulates (MACs) up to the exit, the heads of earlier exits left out; the
            router's included.
        every: MACs of all that an image which leaves there has run: earlier heads too.
        published: as RDI-Nets' code counts its "MFLOPs": ``own`` of convolutions alone, without a
            router, over 2^20.
    """

    params: tuple[int, ...]
    own: tuple[int, ...]
    every: tuple[int, ...]
    published: tuple[float, ...]

    def as_json(self) -> Mapping[str, list[float]]:
        """All of it, by name."""
        return {name: list(values) for name, values in self._asdict().items()}


@lru_cache(maxsize=64)
def exit_costs(
    architecture: Architecture, image_shape: tuple[int, ...], num_classes: int
) -> ExitCosts:
    """What it costs to leave at each exit; takes what ``cost.network_cost`` takes."""
    whole = architecture.without_padding()
    sizes = {"in_channels": image_shape[-1], "num_classes": num_classes}
    model = nnx.eval_shape(lambda: whole.create(**sizes, rngs=nnx.Rngs(0)))
    network, params, stats = functional(model)
    x: Any = jax.ShapeDtypeStruct((1, *image_shape), jax.numpy.float32)
    routing, router = None, 0
    if network.is_moe:
        routing = jax.eval_shape(lambda p, s, x: network.route(p, s, x)[0], params, stats, x)
        router = count_macs(lambda p, s, x: network.route(p, s, x)[0], params, stats, x)

    read, own, every, published = [], [], [], []
    before = {"trunk": router, "every": router, "convolutions": 0}
    seen: set[int] = set()
    for number in range(network.num_exits):

        def run(
            params: Any, stats: Any, x: Any, routing: Any, number: int = number, head: bool = True
        ) -> Any:
            return network.stage(params, stats, number, x, routing=routing, answers=head)

        pass_by = partial(run, head=False)
        arguments = params, stats, x, routing
        of_stage = count_macs(run, *arguments)
        convolutions = count_macs(run, *arguments, only="conv_general_dilated")
        own.append(before["trunk"] + of_stage)
        every.append(before["every"] + of_stage)
        published.append((before["convolutions"] + convolutions) / _MEBI)
        read.append(_count(params, seen | _read(run, *arguments)))
        seen |= _read(pass_by, *arguments)
        before["trunk"] += count_macs(pass_by, *arguments)
        before["every"] += of_stage
        before["convolutions"] += count_macs(pass_by, *arguments, only="conv_general_dilated")
        x = jax.eval_shape(pass_by, *arguments)[0]
    return ExitCosts(tuple(read), tuple(own), tuple(every), tuple(published))


def _read(function: Any, params: Any, *arguments: Any) -> set[int]:
    """Which leaves of the parameters a function reads."""
    jaxpr = jax.make_jaxpr(function)(params, *arguments).jaxpr
    leaves = jaxpr.invars[: len(jax.tree.leaves(params))]
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    return {i for i, variable in enumerate(leaves) if id(variable) in used}


def _count(params: Any, which: set[int]) -> int:
    return sum(leaf.size for i, leaf in enumerate(jax.tree.leaves(params)) if i in which)
