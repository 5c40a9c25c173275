"""Tokens to their experts: what more experts cost, and blocks beside one large product."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from advmoe_jax.evaluation.timing import alternate, ratio
from advmoe_jax.models.transformer import mlp
from advmoe_jax.routing import dispatch
from advmoe_jax.types import Array
from benchmarks.figures import Figure
from benchmarks.programs import Compiled, compiled

SUITE = "tokens"
TOKENS, WIDTH, HIDDEN = 65, 192, 768  # of a CIFAR image, in vit_tiny_32

Parameters = tuple[Array, ...]
Layer = Callable[[Parameters, Array], Array]


def figures(batch: int) -> Iterator[Figure]:
    """One MLP of ``vit_tiny_32`` on the tokens of ``batch`` images, routed at random."""
    tokens = jax.random.normal(jax.random.key(0), (batch * TOKENS, WIDTH))
    layers = {n: _experts(len(tokens), n) for n in (2, 8, 16)}
    for name, program, repeats in (("inference", _inference, 15), ("gradients", _gradients, 9)):
        programs = {str(n): program(layer, _parameters(n), tokens) for n, layer in layers.items()}
        programs["dense"] = program(_dense, _parameters(1), tokens)
        times = alternate({key: p.call for key, p in programs.items()}, repeats=repeats)
        for n in layers:
            yield Figure(
                SUITE,
                f"{name}, {batch} images: {n} experts over a dense MLP of the same MACs",
                ratio(times[str(n)], times["dense"]),
                1.3,
                memory=programs[str(n)].mebibytes,
            )
        yield Figure(
            SUITE,
            f"{name}, {batch} images: 16 experts over 2",
            ratio(times["16"], times["2"]),
            1.25,
        )


def _parameters(num_experts: int) -> Parameters:
    shapes = ((WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return tuple(
        0.05 * jax.random.normal(key, (num_experts, *shape))
        for key, shape in zip(keys, shapes, strict=True)
    )


def _dense(parameters: Parameters, tokens: Array) -> Array:
    return mlp(tokens, *(p[0] for p in parameters))


def _experts(count: int, num_experts: int) -> Layer:
    """A layer whose choices are drawn beforehand: scores cost next to nothing."""
    chosen = jax.random.randint(jax.random.key(2), (count, 1), 0, num_experts)
    block = dispatch.choose_block(count, num_experts, "token")

    def layer(parameters: Parameters, tokens: Array) -> Array:
        # The plan is made anew, as it is in a network.
        plan = dispatch.plan(chosen + tokens[:1, :1].astype(jnp.int32) * 0, num_experts, block)
        return dispatch.apply_experts(mlp, tokens, plan, jnp.ones(chosen.shape), parameters)

    return layer


def _inference(layer: Layer, parameters: Parameters, tokens: Array) -> Compiled:
    return compiled(layer, parameters, tokens)


def _gradients(layer: Layer, parameters: Parameters, tokens: Array) -> Compiled:
    def loss(parameters: Parameters, tokens: Array) -> Array:
        return jnp.sum(jnp.square(layer(parameters, tokens)))

    return compiled(jax.grad(loss, argnums=(0, 1)), parameters, tokens)
