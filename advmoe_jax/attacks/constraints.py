"""The threat model: which perturbations an attacker may use.

A threat is a norm ball around the clean image cut with the pixel range. Every function works on
a batch whose first axis is the image; norms are taken over all other axes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
NORMS = ("linf", "l2")


class Threat(NamedTuple):
    """Perturbations of norm at most ``epsilon`` that keep pixels in [lower, upper].

    Attributes:
        norm: ``linf`` or ``l2``.
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


def make_threat(norm: str, epsilon: float) -> Threat:
    """A threat from a config's words.

    Raises:
        ValueError: if the norm is unknown or epsilon is not positive.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown; choose one of {', '.join(NORMS)}")
    return _checked(Threat(norm, epsilon))


def _checked(threat: Threat) -> Threat:
    if isinstance(threat.epsilon, int | float) and not threat.epsilon > 0:
        raise ValueError(f"epsilon={threat.epsilon} must be positive")
    if not threat.lower < threat.upper:
        raise ValueError(f"pixel range [{threat.lower}, {threat.upper}] is empty")
    return threat


def project(threat: Threat, images: Array, clean: Array) -> Array:
    """The nearest point of the ball around ``clean``, then of the pixel range.

    Clipping to the range moves no pixel away from ``clean``, so the result stays in the ball.
    """
    delta = images - clean
    if threat.norm == "linf":
        delta = jnp.clip(delta, -threat.epsilon, threat.epsilon)
    else:
        norm = _norms(delta)
        delta = delta * jnp.minimum(1.0, threat.epsilon / jnp.maximum(norm, 1e-12))
    return jnp.clip(clean + delta, threat.lower, threat.upper)


def steepest(threat: Threat, gradient: Array) -> Array:
    """The direction of unit norm along which the objective rises fastest; 0 where it is flat."""
    if threat.norm == "linf":
        return jnp.sign(gradient)
    # A confident network's gradients are so small that their squares would underflow.
    axes = tuple(range(1, gradient.ndim))
    largest = jnp.max(jnp.abs(gradient), axis=axes, keepdims=True)
    gradient = gradient / jnp.maximum(largest, jnp.finfo(gradient.dtype).tiny)
    return gradient / jnp.maximum(_norms(gradient), 1e-12)


def uniform_start(threat: Threat, clean: Array, keys: Array) -> Array:
    """A point drawn uniformly from the ball around each image, clipped to the pixel range.

    Args:
        threat: the ball.
        clean: float [B, ...].
        keys: one PRNG key per image, so that the draw does not depend on how a batch is split.
    """
    shape = clean.shape[1:]
    if threat.norm == "linf":
        unit = jax.vmap(lambda k: jax.random.uniform(k, shape, clean.dtype, -1.0, 1.0))(keys)
    else:
        unit = jax.vmap(lambda k: _ball_point(k, shape).astype(clean.dtype))(keys)
    return project(threat, clean + threat.epsilon * unit, clean)


def gaussian_start(threat: Threat, clean: Array, keys: Array, scale: float) -> Array:
    """``clean + scale * N(0, I)``, projected: the start of TRADES (Zhang et al., 2019)."""
    noise = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:], clean.dtype))(keys)
    return project(threat, clean + scale * noise, clean)


def _ball_point(key: Array, shape: tuple[int, ...]) -> Array:
    direction, radius = jax.random.split(key)
    point = jax.random.normal(direction, shape)
    size = max(point.size, 1)
    return point / jnp.linalg.norm(point) * jax.random.uniform(radius) ** (1.0 / size)


def _norms(x: Array) -> Array:
    axes = tuple(range(1, x.ndim))
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
