"""What a network costs: multiply-accumulates and parameters, read from the traced computation.

Counting from the jaxpr rather than from a formula per layer means that the number describes the
program that was written: the router, a dispatch's padding and a forgotten projection all count.
Nothing is computed, and no parameters are made.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import flax.nnx as nnx
import jax

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.model import Model
from advmoe_jax.models.network import functional
from advmoe_jax.models.registry import Architecture
from advmoe_jax.models.router import PRESETS

# A router is too large if router and pathway cost more than this share of the dense network.
AFFORDABLE = 0.45
# These hide what they compute, or how often: refusing is better than a number that looks right.
_OPAQUE = ("pallas_call", "call_hi_primitive", "ffi_call")


def count_macs(function: Callable[..., Any], *args: Any, only: str = "") -> int:
    """Counts the multiply-accumulates (MACs) of one call ``function(*args)``, without running it.

    Convolutions count output elements x kernel taps x input channels per group, so taps that fall
    on padding or between dilated inputs are included, as papers do. Dot products count
    batch x M x N x K; a ragged dot counts each row once, for the one group that it belongs to.
    A scan counts its body ``length`` times, a conditional its most expensive branch, a
    ``shard_map`` its body once per device. What is traced counts, even if the compiler may drop it
    as unused. Elementwise arithmetic, pooling, sorting and gathering count nothing, nor do
    decompositions and Fourier transforms.

    Args:
        function: traceable by JAX; close over whatever is not an array.
        *args: pytrees of arrays or of ``jax.ShapeDtypeStruct``.
        only: name of a primitive, such as ``conv_general_dilated``, that counts alone; empty: all.

    Returns:
        MACs of the whole call; divide by the batch size for MACs per image.

    Raises:
        ValueError: a while loop contains MACs (its trip count depends on data; a ``fori_loop``
            with Python integers as bounds is a scan and does count), or a primitive hides its
            computation.
    """
    return _jaxpr_macs(jax.make_jaxpr(function)(*args), only)


def count_params(tree: Any) -> int:
    """Counts the scalars in a pytree of arrays or of ``jax.ShapeDtypeStruct``."""
    return sum(math.prod(jax.numpy.shape(leaf)) for leaf in jax.tree.leaves(tree))


# To trace a network takes half a second, and its cost is wanted at every evaluation.
@lru_cache(maxsize=64)
def network_cost(
    architecture: Architecture, image_shape: tuple[int, ...], num_classes: int
) -> Mapping[str, Mapping[str, int]]:
    """Parameters, and multiply-accumulates (MACs) per image in inference mode.

    Args:
        architecture: the network, of any family.
        image_shape: (height, width, channels).
        num_classes: number of logits.

    Returns:
        ``params``: ``total``; ``router``; ``backbone``, all that is not the router; ``pathway``,
        the part of the backbone that one image uses. ``macs``: ``total``; ``router``; ``pathway``;
        ``dense``, of the same backbone with one expert at full width.

    Raises:
        UserError: if the architecture describes no network.
    """
    model, macs = _traced(architecture, image_shape, num_classes)
    _, params, _ = functional(model)
    of_part = {part: count_params(tree) for part, tree in params.items()}
    router = of_part.pop("router", 0)
    backbone = sum(of_part.values())
    return {
        "params": {
            "total": router + backbone,
            "router": router,
            "backbone": backbone,
            "pathway": backbone - _idle_params(model),
        },
        "macs": {
            **macs,
            "dense": _traced(architecture.dense(), image_shape, num_classes)[1]["total"],
        },
    }


def _idle_params(model: Model) -> int:
    """Parameters of the backbone that one image does not use."""
    nodes = (node for _, node in nnx.iter_graph(model.backbone))
    return sum(node.idle_params(model.top_k) for node in nodes if hasattr(node, "idle_params"))


def describe(cost: Mapping[str, Mapping[str, int]]) -> str:
    """The cost in one line."""
    params, macs = cost["params"], cost["macs"]
    text = f"{params['total']:,} parameters, {macs['total']:,} MACs per image"
    if macs["router"]:
        text += f" (router {macs['router']:,}, pathway {macs['pathway']:,})"
    if macs["total"] != macs["dense"]:
        share = macs["total"] / macs["dense"]
        text += f", {share:.3f} of the dense network's {macs['dense']:,}"
    return text


def default_router(architecture: CNN, image_shape: tuple[int, ...], num_classes: int) -> str:
    """The first of ``PRESETS`` with which an image costs at most ``AFFORDABLE`` of the dense one.

    Takes what ``network_cost`` takes, and disregards the router. The last, if none suffices.
    """
    for name, size in PRESETS.items():
        with_router = architecture._replace(router=RouterSettings.of(size))
        macs = network_cost(with_router, image_shape, num_classes)["macs"]
        if macs["total"] <= AFFORDABLE * macs["dense"]:
            return name
    return list(PRESETS)[-1]


def keep_for(
    architecture: CNN, image_shape: tuple[int, ...], num_classes: int, target: float
) -> float:
    """The largest ``keep``, in steps of 1/1000, with which MACs are at most a share of dense.

    Takes what ``network_cost`` takes, and ``target``, the share in (0, 1).

    Raises:
        UserError: if even the smallest share of channels costs more.
    """
    low, high = 0, 1000
    while high - low > 1:
        middle = (low + high) // 2
        sparse = architecture._replace(keep=middle / 1000)
        macs = network_cost(sparse, image_shape, num_classes)["macs"]
        low, high = (middle, high) if macs["total"] <= target * macs["dense"] else (low, middle)
    if low == 0:
        raise UserError(
            f"{architecture.name} cannot be pruned to {target} of the dense network's MACs"
        )
    return low / 1000


def _traced(
    architecture: Architecture, image_shape: tuple[int, ...], num_classes: int
) -> tuple[Any, dict[str, int]]:
    """The network without values, and the MACs of one image: total, router, pathway."""
    whole = architecture.without_padding()
    model = nnx.eval_shape(
        lambda: whole.create(in_channels=image_shape[-1], num_classes=num_classes, rngs=nnx.Rngs(0))
    )
    network, params, stats = functional(model)
    image = jax.ShapeDtypeStruct((1, *image_shape), jax.numpy.float32)

    def classify(params: Any, stats: Any, image: Any, routing: Any = None) -> Any:
        return network.apply(params, stats, image, routing=routing)[0]

    output = jax.eval_shape(classify, params, stats, image)
    total = count_macs(classify, params, stats, image)
    pathway = total
    if output.routing is not None:
        pathway = count_macs(classify, params, stats, image, output.routing)
    return model, {"total": total, "router": total - pathway, "pathway": pathway}


def _jaxpr_macs(jaxpr: Any, only: str) -> int:
    """Sums over the equations of a ``Jaxpr`` or ``ClosedJaxpr``."""
    return sum(_equation_macs(equation, only) for equation in jaxpr.eqns)


def _equation_macs(equation: Any, only: str) -> int:
    """Counts one equation, with whatever jaxprs it holds."""
    name, params = equation.primitive.name, equation.params
    is_product = name in ("conv_general_dilated", "dot_general", "ragged_dot_general")
    if is_product and only not in ("", name):
        return 0
    if name == "conv_general_dilated":
        return _conv_macs(equation)
    if name in ("dot_general", "ragged_dot_general"):
        return _dot_macs(equation)
    if name in _OPAQUE:
        raise ValueError(f"cannot count the multiply-accumulates inside the primitive {name!r}")

    inner = [_jaxpr_macs(jaxpr, only) for jaxpr in _sub_jaxprs(params)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "shard_map":
        return _num_shards(params) * sum(inner)
    if name == "while" and any(inner):
        raise ValueError(
            "cannot count the multiply-accumulates of a while loop, whose trip count depends on"
            " data; use lax.scan, or lax.fori_loop with Python integers as bounds"
        )
    if sum(count > 0 for count in inner) > 1:
        # For example custom_linear_solve: four alternatives, of which a call uses one or two.
        raise ValueError(f"cannot tell which of the functions inside {name!r} are executed")
    return sum(inner)


def _conv_macs(equation: Any) -> int:
    """Output elements x kernel elements per output channel; any strides, dilations and groups.

    The kernel's input dimension already is channels per feature group, and batch groups shrink the
    output's batch, so neither needs a factor of its own.
    """
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) // max(out_channels, 1)
    return math.prod(equation.outvars[0].aval.shape) * taps


def _dot_macs(equation: Any) -> int:
    """Elements of the left side x free dimensions of the right side (N)."""
    lhs, rhs = (operand.aval.shape for operand in equation.invars[:2])
    groups: tuple[int, ...] = ()
    if equation.primitive.name == "ragged_dot_general":
        ragged = equation.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batch) = ragged.dot_dimension_numbers
        groups = tuple(ragged.rhs_group_dimensions)
    else:
        (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    shared = {*contracted, *batch, *groups}
    return math.prod(lhs) * math.prod(n for axis, n in enumerate(rhs) if axis not in shared)


def _sub_jaxprs(value: Any) -> Iterator[Any]:
    """Finds the jaxprs among an equation's parameters, whatever JAX calls those parameters."""
    if hasattr(value, "eqns"):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sub_jaxprs(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _sub_jaxprs(item)


def _num_shards(params: dict[str, Any]) -> int:
    """Copies of a ``shard_map`` body: the product of its mesh's manual axes."""
    shape = params["mesh"].shape
    manual = params.get("newly_manual_axes", params.get("manual_axes", tuple(shape)))
    return math.prod(shape[axis] for axis in manual)
