"""Loops with convolutions of every layout: the same values as ``lax``'s own, in a faster form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p

from advmoe_jax.attacks import apgd, linf, pgd
from advmoe_jax.attacks.loops import repeat, repeat_while, with_fast_convolutions

KERNELS = [
    0.3 * jax.random.normal(jax.random.key(i), (3, 3, before, 8)) for i, before in ((0, 3), (1, 8))
]
GROUPED = 0.3 * jax.random.normal(jax.random.key(2), (3, 3, 4, 8))
IMAGES = jax.random.uniform(jax.random.key(3), (4, 9, 10, 3))
LABELS = jnp.array([0, 3, 5, 7])


def conv(x, kernel, numbers=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **options)


def usual(x):
    x = jax.nn.relu(conv(x, KERNELS[0], window_strides=(2, 2), padding=((1, 0), (0, 1))))
    return conv(x, KERNELS[1], rhs_dilation=(2, 2)).mean((1, 2))


def torch_like(x):
    numbers = ("NCHW", "OIHW", "NCHW")
    x = x.transpose(0, 3, 1, 2)
    x = jax.nn.relu(conv(x, KERNELS[0].transpose(3, 2, 0, 1), numbers))
    return conv(x, KERNELS[1].transpose(3, 2, 0, 1), numbers, window_strides=(2, 1)).mean((2, 3))


def grouped(x):
    x = conv(x, KERNELS[0])
    return conv(x, GROUPED, feature_group_count=2).mean((1, 2))


def transposed(x):
    return lax.conv_transpose(x, KERNELS[0], (2, 2), "SAME").mean((1, 2))


def scanned(x):
    def layer(x, _):
        return jax.nn.relu(conv(x, KERNELS[1])), None

    return lax.scan(layer, conv(x, KERNELS[0]), None, length=2)[0].mean((1, 2))


def chosen(x):
    return lax.cond(x.mean() > 0.1, usual, torch_like, x)


def with_a_rule(x):
    @jax.custom_vjp
    def own(x):
        return usual(x)

    own.defvjp(lambda x: (usual(x), x), lambda x, g: (x * g.sum(),))
    return own(x)


FUNCTIONS = [
    *(usual, torch_like, grouped, transposed, scanned, chosen, with_a_rule),
    *(jax.jit(usual), jax.checkpoint(torch_like), jax.vmap(lambda x: usual(x[None])[0])),
]


def step(function):
    """What attacks do in their loops: a gradient, a step, and a look."""

    def one(i, carry):
        x, best = carry
        value, gradient = jax.value_and_grad(lambda x: jax.nn.logsumexp(function(x), -1).sum())(x)
        return x + 0.01 * jnp.sign(gradient), jnp.maximum(best, value)

    return one


@pytest.mark.parametrize("number", range(len(FUNCTIONS)))
def test_values_are_those_of_the_plain_loop(number):
    body, start = step(FUNCTIONS[number]), (IMAGES, jnp.float32(0))
    fast = jax.jit(lambda carry: repeat(3, body, carry))(start)
    plain = jax.jit(lambda carry: lax.fori_loop(0, 3, body, carry))(start)
    for a, b in zip(fast, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def layouts(jaxpr):
    """The dimension numbers of every convolution, those within other functions too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive is conv_general_dilated_p:
            found.add(equation.params["dimension_numbers"])
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                inner = getattr(part, "jaxpr", part)
                found |= layouts(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("number", [n for n, f in enumerate(FUNCTIONS) if f is not with_a_rule])
def test_every_convolution_has_the_fast_layout(number):
    body = step(FUNCTIONS[number])
    start = jnp.int32(0), (IMAGES, jnp.float32(0))
    assert len(layouts(jax.make_jaxpr(body)(*start).jaxpr)) > 1
    canonical = {lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}
    assert layouts(jax.make_jaxpr(with_fast_convolutions(body))(*start).jaxpr) == canonical


def test_a_function_without_convolutions_is_called_as_it_is():
    calls = []

    def body(i, x):
        calls.append(type(i).__name__)
        return {"x": x["x"] @ x["x"]}

    found = repeat(jnp.int32(2), body, {"x": jnp.eye(3)})
    np.testing.assert_array_equal(found["x"], np.eye(3))
    assert len(calls) == 2  # looked through, then traced into the loop


def test_a_loop_of_unknown_length():
    fast = repeat_while(lambda c: c[1] < 30, lambda c: step(usual)(0, c), (IMAGES, jnp.float32(0)))
    plain = lax.while_loop(
        lambda c: c[1] < 30, lambda c: step(usual)(0, c), (IMAGES, jnp.float32(0))
    )
    np.testing.assert_allclose(fast[0], plain[0], atol=1e-6)


@pytest.mark.parametrize("make", [apgd, lambda threat, **k: pgd(threat, step_size=0.01, **k)])
def test_attacks_find_the_same_with_either_layout(make):
    def same_in_nchw(x):
        numbers = ("NCHW", "OIHW", "NCHW")
        x = conv(x.transpose(0, 3, 1, 2), KERNELS[0].transpose(3, 2, 0, 1), numbers)
        return jax.nn.relu(x).mean((2, 3))

    def same(x):
        return jax.nn.relu(conv(x, KERNELS[0])).mean((1, 2))

    attack = make(linf(0.03), num_steps=5)
    found = [jax.jit(lambda x, f=f: attack(f, x, LABELS, jax.random.key(5)))(IMAGES)
             for f in (same, same_in_nchw)]  # fmt: skip
    np.testing.assert_allclose(*found, atol=1e-5)
