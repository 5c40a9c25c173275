"""The smallest step inside the pixel range to a hyperplane; the geometry of FAB.

Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
ICML 2020, section 3.1 (their eq. 6), solved exactly by sorting where pixels meet the range.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def step_to_hyperplane(
    norm: str, points: Array, normals: Array, gaps: Array, lower: float, upper: float
) -> Array:
    """The step of smallest norm that takes each point to its hyperplane.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        points: float [B, D] in the pixel range.
        normals: float [B, D].
        gaps: float [B], how much ``normals . points`` must grow.
        lower: smallest pixel value.
        upper: largest pixel value.

    Returns:
        Steps [B, D] with ``points + steps`` in the range and ``normals . steps = gaps``; where no
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

    What is gained grows with the time along a concave polygon; its inverse at ``gap`` is the
    largest of the inverses of its edges' lines.
    """
    arrival = jnp.where(speed > 0, room / jnp.maximum(speed, 1e-30), jnp.inf)
    order = jnp.argsort(arrival, axis=1)
    gains, slopes = (jnp.take_along_axis(a, order, axis=1) for a in (weight * room, weight * speed))
    gained = jnp.cumsum(gains, axis=1) - gains
    slope = jnp.cumsum(slopes[:, ::-1], axis=1)[:, ::-1]
    times = jnp.where(slope > 0, (gap - gained) / jnp.maximum(slope, 1e-30), 0.0)
    return jnp.maximum(jnp.max(times, axis=1, keepdims=True), 0.0)


def _dearest_first(weight: Array, room: Array, gap: Array) -> Array:
    """l1: the pixels of the largest weights go all the way, one of them part of it."""
    order = jnp.argsort(-weight, axis=1)
    weights, rooms = (jnp.take_along_axis(a, order, axis=1) for a in (weight, room))
    gained = jnp.cumsum(weights * rooms, axis=1) - weights * rooms
    steps = jnp.clip((gap - gained) / jnp.maximum(weights, 1e-30), 0, rooms)
    return jnp.take_along_axis(steps, jnp.argsort(order, axis=1), axis=1)
