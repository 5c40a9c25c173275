"""What a network costs: multiply-accumulates and parameters, read from the traced computation.

Counting from the jaxpr rather than from a formula per layer means that the number describes the
program that was written: the router, a dispatch's padding and a forgotten projection all count.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

# These hide what they compute, or how often: refusing is better than a number that looks right.
_OPAQUE = ("pallas_call", "call_hi_primitive", "ffi_call")


def count_macs(function: Callable[..., Any], *args: Any) -> int:
    """Counts the multiply-accumulates (MACs) of one call `function(*args)`, without running it.

    Convolutions count output elements x kernel taps x input channels per group, so taps that fall
    on padding or between dilated inputs are included, as papers do. Dot products count
    batch x M x N x K; a ragged dot counts each row once, for the one group that it belongs to.
    A scan counts its body `length` times, a conditional its most expensive branch, a `shard_map`
    its body once per device. What is traced counts, even if the compiler may drop it as unused.
    Elementwise arithmetic, pooling, sorting and gathering count nothing, nor do decompositions and
    Fourier transforms.

    Args:
      function: traceable by JAX; close over whatever is not an array.
      *args: pytrees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      MACs of the whole call; divide by the batch size for MACs per image.

    Raises:
      ValueError: a while loop contains MACs (its trip count depends on data; a `fori_loop` with
        Python integers as bounds is a scan and does count), or a primitive hides its computation.
    """
    return _jaxpr_macs(jax.make_jaxpr(function)(*args))


def count_params(tree: Any) -> int:
    """Counts the scalars in a pytree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(math.prod(jax.numpy.shape(leaf)) for leaf in jax.tree.leaves(tree))


def _jaxpr_macs(jaxpr: Any) -> int:
    """Sums over the equations of a `Jaxpr` or `ClosedJaxpr`."""
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: Any) -> int:
    """Counts one equation, with whatever jaxprs it holds."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return _conv_macs(equation)
    if name in ("dot_general", "ragged_dot_general"):
        return _dot_macs(equation)
    if name in _OPAQUE:
        raise ValueError(f"cannot count the multiply-accumulates inside the primitive {name!r}")

    inner = [_jaxpr_macs(jaxpr) for jaxpr in _sub_jaxprs(params)]
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
    """Copies of a `shard_map` body: the product of its mesh's manual axes."""
    shape = params["mesh"].shape
    manual = params.get("newly_manual_axes", params.get("manual_axes", tuple(shape)))
    return math.prod(shape[axis] for axis in manual)
