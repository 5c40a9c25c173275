"""The threat model: which perturbations an attacker may use.

A threat is a norm ball around the clean image cut with the pixel range. Every function works on
a batch whose first axis is the image; norms are taken over all other axes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Key

from advmoe_jax.types import Array

# Of any shape; float, in the threat's pixel range.
AnyImages = Float[Array, "batch ..."]
NORMS = ("linf", "l2", "l1")


class Threat(NamedTuple):
    """Perturbations of norm at most ``epsilon`` that keep pixels in [lower, upper].

    Attributes:
        norm: ``linf``, ``l2`` or ``l1``.
        epsilon: radius, in units of the pixel range; a number or a float32 scalar array.
        lower: smallest pixel value.
        upper: largest pixel value.
    """

    norm: str
    epsilon: float | Array
    lower: float = 0.0
    upper: float = 1.0


def linf(epsilon: float | Array, lower: float = 0.0, upper: float = 1.0) -> Threat:
    """Each pixel may change by at most ``epsilon``."""
    return _checked(Threat("linf", epsilon, lower, upper))


def l2(epsilon: float | Array, lower: float = 0.0, upper: float = 1.0) -> Threat:
    """The whole image may move by at most ``epsilon`` in Euclidean distance."""
    return _checked(Threat("l2", epsilon, lower, upper))


def l1(epsilon: float | Array, lower: float = 0.0, upper: float = 1.0) -> Threat:
    """All pixels together may change by at most ``epsilon``."""
    return _checked(Threat("l1", epsilon, lower, upper))


def diameter(threat: Threat, shape: tuple[int, ...]) -> float:
    """The largest distance that two images of that shape can have, in the threat's norm."""
    pixels = math.prod(shape)
    scale = {"l2": math.sqrt(pixels), "l1": pixels}.get(threat.norm, 1)
    return (threat.upper - threat.lower) * scale


def make_threat(norm: str, epsilon: float) -> Threat:
    """A threat from a config's words.

    Raises:
        ValueError: if the norm is unknown, or epsilon is not positive, or wider than the pixel
            range in linf.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    return _checked(Threat(norm, epsilon))


def _checked(threat: Threat) -> Threat:
    if isinstance(threat.epsilon, int | float) and not threat.epsilon > 0:
        raise ValueError(f"epsilon={threat.epsilon} must be positive")
    if not threat.lower < threat.upper:
        raise ValueError(f"pixel range [{threat.lower}, {threat.upper}] is empty")
    width = threat.upper - threat.lower
    is_given = isinstance(threat.epsilon, int | float) and not math.isinf(threat.epsilon)
    if is_given and threat.norm == "linf" and threat.epsilon > width:
        raise ValueError(
            f"epsilon={threat.epsilon} is wider than the pixel range "
            f"[{threat.lower:g}, {threat.upper:g}]: give a number such as 8/255, or give the "
            "threat lower and upper"
        )
    return threat


def project(threat: Threat, images: AnyImages, clean: AnyImages) -> AnyImages:
    """The nearest point of the ball around ``clean``, then of the pixel range.

    Clipping to the range moves no pixel away from ``clean``, so the result stays in the ball. In
    l1 it is the nearest point of both at once: clipping afterwards would waste most of the ball
    (Croce and Hein, 2021, section 3).
    """
    delta = images - clean
    if threat.norm == "l1":
        delta = _project_l1(threat, delta, clean)
    elif threat.norm == "linf":
        delta = jnp.clip(delta, -threat.epsilon, threat.epsilon)
    else:
        norm = _norms(delta)
        delta = delta * jnp.minimum(1.0, threat.epsilon / jnp.maximum(norm, 1e-12))
    return jnp.clip(clean + delta, threat.lower, threat.upper)


def box(threat: Threat, clean: AnyImages) -> tuple[AnyImages, AnyImages]:
    """The least and the largest value that each pixel can take, one by one.

    In linf this is the ball itself; it holds every smaller ball of that radius.
    """
    low = jnp.maximum(clean - threat.epsilon, threat.lower)
    return low, jnp.minimum(clean + threat.epsilon, threat.upper)


def steepest(threat: Threat, gradient: AnyImages) -> AnyImages:
    """The direction of unit norm along which the objective rises fastest; 0 where it is flat."""
    if threat.norm == "linf":
        return jnp.sign(gradient)
    if threat.norm == "l1":
        size = jnp.abs(gradient)
        axes = tuple(range(1, gradient.ndim))
        largest = (size == jnp.max(size, axis=axes, keepdims=True)) & (size > 0)
        return jnp.sign(gradient) * largest / jnp.maximum(jnp.sum(largest, axes, keepdims=True), 1)
    # A confident network's gradients are so small that their squares would underflow.
    axes = tuple(range(1, gradient.ndim))
    largest = jnp.max(jnp.abs(gradient), axis=axes, keepdims=True)
    gradient = gradient / jnp.maximum(largest, jnp.finfo(gradient.dtype).tiny)
    return gradient / jnp.maximum(_norms(gradient), 1e-12)


def uniform_start(threat: Threat, clean: AnyImages, keys: Key[Array, " batch"]) -> AnyImages:
    """A point drawn uniformly from the ball around each image, clipped to the pixel range.

    Args:
        threat: the ball.
        clean: where it lies.
        keys: one PRNG key per image, so that the draw does not depend on how a batch is split.
    """
    shape = clean.shape[1:]
    if threat.norm == "linf":
        unit = jax.vmap(lambda k: jax.random.uniform(k, shape, clean.dtype, -1.0, 1.0))(keys)
    else:
        draw = _ball_point if threat.norm == "l2" else _cross_polytope_point
        unit = jax.vmap(lambda k: draw(k, shape).astype(clean.dtype))(keys)
    return project(threat, clean + threat.epsilon * unit, clean)


def gaussian_start(
    threat: Threat, clean: AnyImages, keys: Key[Array, " batch"], scale: float | Array
) -> AnyImages:
    """``clean + scale * N(0, I)``, projected: the start of TRADES (Zhang et al., 2019)."""
    noise = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:], clean.dtype))(keys)
    return project(threat, clean + scale * noise, clean)


def signs_start(
    threat: Threat, clean: AnyImages, keys: Key[Array, " batch"], scale: float | Array
) -> AnyImages:
    """``clean + scale * u``, projected: the start of R+FGSM (Tramer et al., 2018).

    u is sign(N(0, I)), in l2 and l1 made as long as 1.
    """
    shape = clean.shape[1:]
    signs = jax.vmap(lambda k: jax.random.rademacher(k, shape, clean.dtype))(keys)
    length = diameter(threat._replace(lower=0.0, upper=1.0), shape)
    return project(threat, clean + scale / length * signs, clean)


def _ball_point(key: Array, shape: tuple[int, ...]) -> Array:
    direction, radius = jax.random.split(key)
    point = jax.random.normal(direction, shape)
    size = max(point.size, 1)
    return point / jnp.linalg.norm(point) * jax.random.uniform(radius) ** (1.0 / size)


def _cross_polytope_point(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in the l1 ball: exponential magnitudes and one more for the distance to the rim."""
    signs, sizes = jax.random.split(key)
    size = math.prod(shape)
    draws = jax.random.exponential(sizes, (size + 1,))
    return jax.random.rademacher(signs, shape) * (draws[:size] / jnp.sum(draws)).reshape(shape)


def _project_l1(threat: Threat, delta: Array, clean: Array) -> Array:
    """The perturbation nearest to ``delta`` in the l1 ball and the pixel range.

    Every magnitude shrinks by the same amount and stops at 0 or at the pixel range. The amount
    is found by bisection, then exactly from the pixels that stopped nowhere.
    """
    axes = tuple(range(1, delta.ndim))
    size = jnp.abs(delta.astype(jnp.float32))
    room = jnp.where(delta > 0, threat.upper - clean, clean - threat.lower)
    room = jnp.maximum(room, 0).astype(jnp.float32)

    def total(shrink: Array) -> Array:
        return jnp.sum(jnp.clip(size - shrink, 0, room), axes, keepdims=True)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (bounds[0] + bounds[1]) / 2
        outside = total(middle) > threat.epsilon
        return jnp.where(outside, middle, bounds[0]), jnp.where(outside, bounds[1], middle)

    largest = jnp.max(size, axes, keepdims=True)
    low, high = lax.fori_loop(0, 26, halve, (jnp.zeros_like(largest), largest))
    full = size - low >= room
    free = (size > low) & ~full
    excess = jnp.sum(size * free + room * full, axes, keepdims=True) - threat.epsilon
    exact = jnp.clip(excess / jnp.maximum(jnp.sum(free, axes, keepdims=True), 1), low, high)
    shrink = jnp.where(total(jnp.zeros_like(low)) > threat.epsilon, exact, 0.0)
    result = jnp.clip(size - shrink, 0, room)
    # Rounding of a long sum may leave it just outside.
    norm = jnp.sum(result, axes, keepdims=True)
    result = result * jnp.minimum(1.0, threat.epsilon / jnp.maximum(norm, 1e-12))
    return (jnp.sign(delta) * result).astype(delta.dtype)


def distance(threat: Threat, images: AnyImages, clean: AnyImages) -> Float[Array, " batch"]:
    """The norm of ``images - clean`` in the threat's norm, float32."""
    delta = jnp.abs((images - clean).astype(jnp.float32)).reshape(images.shape[0], -1)
    if threat.norm == "linf":
        return jnp.max(delta, axis=1)
    return jnp.sum(delta, axis=1) if threat.norm == "l1" else jnp.linalg.norm(delta, axis=1)


def _norms(x: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
