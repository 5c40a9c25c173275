"""Loops of attacks, whose convolutions run as fast inside as outside, whoever wrote them.

In a loop XLA's CPU backend runs a convolution on a naive path, ten times slower and more, unless
its dimension numbers are NHWC, HWIO and NHWC (jax-ml/jax issue 12868). The gradients that JAX
derives of any convolution have others, and so has a network that sees its images as NCHW. So what
is traced of a loop's body is looked through there, and every other convolution is done as one of
those between transposes: the same sums of the same products.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from jax import lax
from jax.extend import core
from jax.extend.core.primitives import conv_general_dilated_p

from advmoe_jax import target
from advmoe_jax.types import Array

Carry = TypeVar("Carry")
_CANONICAL = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# What has a rule of its own for gradients is bound with functions, and left as it is.
_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")


def repeat(count: int | Array, body: Callable[[Array, Carry], Carry], carry: Carry) -> Carry:
    """``lax.fori_loop(0, count, body, carry)``."""
    return lax.fori_loop(0, count, with_fast_convolutions(body), carry)


def repeat_while(
    going_on: Callable[[Carry], Array], body: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """``lax.while_loop(going_on, body, carry)``; ``going_on`` has no convolutions."""
    return lax.while_loop(going_on, with_fast_convolutions(body), carry)


def with_fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, such that its two-dimensional convolutions are fast inside of a CPU's loop.

    Args:
        function: of trees of arrays. On other platforms, and if it has no such convolution, it is
            called as it is.
    """

    def run(*arguments: Any) -> Any:
        if target.platform() != "cpu":
            return function(*arguments)
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not _is_slow(traced.jaxpr):
            return function(*arguments)
        results = _evaluated(traced.jaxpr, traced.consts, jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _is_slow(jaxpr: core.Jaxpr) -> bool:
    return any(
        _is_slow_convolution(equation) or any(map(_is_slow, _within(equation)))
        for equation in jaxpr.eqns
    )


def _is_slow_convolution(equation: core.JaxprEqn) -> bool:
    return (
        equation.primitive is conv_general_dilated_p
        and len(equation.params["window_strides"]) == 2
        and equation.params["dimension_numbers"] != _CANONICAL
    )


def _within(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The functions that an equation calls, such as a loop's body, and may be bound anew with."""
    if equation.primitive.name in _WITH_RULES:
        return
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _evaluated(jaxpr: core.Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """What the equations say of the arguments, with fast convolutions."""
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = list(map(read, equation.invars))
        if _is_slow_convolution(equation):
            results: Any = _fast_convolution(*values, **equation.params)
        else:
            params = equation.params
            if any(map(_is_slow, _within(equation))):
                params = {name: _rewritten(value) for name, value in params.items()}
            results = equation.primitive.bind(
                *values, **equation.primitive.get_bind_params(dict(params))
            )
        if not equation.primitive.multiple_results:
            results = [results]
        known |= dict(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _rewritten(value: Any) -> Any:
    """A parameter of an equation, with fast convolutions in the functions that it holds."""
    if isinstance(value, tuple | list):
        return type(value)(map(_rewritten, value))
    if isinstance(value, core.Jaxpr):
        closed = _rewritten(core.ClosedJaxpr(value, ()))
        return value if closed.consts else closed.jaxpr
    if not isinstance(value, core.ClosedJaxpr):
        return value
    # Types, not shapes alone: under a shard_map they say along which axes a value varies.
    return jax.make_jaxpr(lambda *a: _evaluated(value.jaxpr, value.consts, a))(*value.in_avals)


def _fast_convolution(
    images: Array, kernel: Array, *, dimension_numbers: lax.ConvDimensionNumbers, **params: Any
) -> Array:
    """``lax.conv_general_dilated`` by way of NHWC, HWIO and NHWC."""
    of_images, of_kernel, of_result = dimension_numbers
    result = conv_general_dilated_p.bind(
        lax.transpose(images, _moved(of_images, _CANONICAL.lhs_spec)),
        lax.transpose(kernel, _moved(of_kernel, _CANONICAL.rhs_spec)),
        dimension_numbers=_CANONICAL,
        **params,
    )
    return lax.transpose(result, _moved(_CANONICAL.out_spec, of_result))


def _moved(given: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """How axes are permuted: specs say at which axis batch, features, rows and columns lie."""
    moved = [0] * len(given)
    for origin, place in zip(given, wanted, strict=True):
        moved[place] = origin
    return tuple(moved)
