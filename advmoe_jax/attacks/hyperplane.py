"""The smallest step inside the pixel range to a hyperplane; the geometry of FAB.

Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
ICML 2020, section 3.1 (their eq. 6). They sort the pixels; a search needs no sort, which is
slow on some backends.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from advmoe_jax.types import Array

# Newton's method here visits an edge of a polygon at most once, and in practice few of them.
NEWTON_STEPS = 40
BISECTION_STEPS = 26


def step_to_hyperplane(
    norm: str,
    points: Float[Array, "batch pixels"],
    normals: Float[Array, "batch pixels"],
    gaps: Float[Array, " batch"],
    lower: float,
    upper: float,
) -> Float[Array, "batch pixels"]:
    """The step of smallest norm that takes each point to its hyperplane.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        points: in the pixel range.
        normals: of the hyperplanes.
        gaps: how much ``normals . points`` must grow.
        lower: smallest pixel value.
        upper: largest pixel value.

    Returns:
        Steps with ``points + steps`` in the range and ``normals . steps = gaps``; where no
        point of the range reaches the hyperplane, the step that comes nearest to it.
    """
    scale = jnp.max(jnp.abs(normals), axis=1, keepdims=True)
    scale = jnp.maximum(scale, jnp.finfo(normals.dtype).tiny)
    # Only the direction in which each pixel helps matters, and how far it can go that way.
    sign = jnp.sign(normals) * jnp.where(gaps < 0, -1.0, 1.0)[:, None]
    weight = jnp.abs(normals) / scale
    gap = jnp.abs(gaps)[:, None] / scale
    room = jnp.where(sign > 0, upper - points, points - lower)
    room = jnp.maximum(room, 0) * (weight > 0)
    if norm == "l1":
        return sign * _dearest_first(weight, room, gap)
    speed = weight if norm == "l2" else (weight > 0).astype(weight.dtype)
    return sign * jnp.minimum(_travel(weight, speed, room, gap) * speed, room)


def _travel(weight: Array, speed: Array, room: Array, gap: Array) -> Array:
    """How long all pixels must travel at their speeds, stopping at the range, to close the gap.

    What is gained grows with the time along a concave polygon, so that Newton's method rises to
    the answer without passing it.
    """

    def missing(time: Array) -> Array:
        gained = weight * jnp.minimum(time * speed, room)
        return gap - jnp.sum(gained, axis=1, keepdims=True)

    def is_open(time: Array) -> Array:
        free = jnp.any(time * speed < room, axis=1, keepdims=True)
        return free & (missing(time) > 1e-6 * gap)

    def newton(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        count, time = carry
        slope = jnp.sum(weight * speed * (time * speed < room), axis=1, keepdims=True)
        ahead = time + jnp.maximum(missing(time), 0) / jnp.maximum(slope, 1e-30)
        return count + 1, jnp.where(is_open(time), ahead, time)

    def going_on(carry: tuple[Array, Array]) -> Array:
        return (carry[0] < NEWTON_STEPS) & jnp.any(is_open(carry[1]))

    return lax.while_loop(going_on, newton, (jnp.zeros((), jnp.int32), jnp.zeros_like(gap)))[1]


def _dearest_first(weight: Array, room: Array, gap: Array) -> Array:
    """l1: pixels go all the way in the order of their weights, the last of them part of it."""

    def gained(least: Array) -> Array:
        return jnp.sum(weight * room * (weight > least), axis=1, keepdims=True)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (bounds[0] + bounds[1]) / 2
        enough = gained(middle) >= gap
        return jnp.where(enough, middle, bounds[0]), jnp.where(enough, bounds[1], middle)

    start = jnp.zeros_like(gap), jnp.ones_like(gap)
    low, high = lax.fori_loop(0, BISECTION_STEPS, halve, start)
    dear, last = weight > high, (weight > low) & (weight <= high)
    left = gap - gained(high)
    share = left / jnp.maximum(jnp.sum(weight * room * last, axis=1, keepdims=True), 1e-30)
    return room * (dear + jnp.clip(share, 0, 1) * last)
