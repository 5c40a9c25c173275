"""Loss and gradient of an attacked function, averaged over its noise if it has any.

Expectation over transformation (Athalye et al., ICML 2018): a randomised function is attacked
through the mean of its loss. Such a function takes keys beside the images,
``function(images, keys)`` with one PRNG key per image, so that what image i meets does not depend
on the batch it is in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.losses import Loss
from advmoe_jax.types import Array


def loss_and_gradient(
    function: Callable[..., Any],
    loss: Loss,
    images: Array,
    target: Any,
    keys: Array,
    samples: int = 0,
) -> tuple[Array, Array, Array]:
    """The attacker's loss, whether it has won, and the loss's gradient, at ``images``.

    Args:
        function: ``function(images)``, or ``function(images, keys)`` when ``samples`` is not 0.
        loss: what is maximised.
        images: float [B, ...].
        target: what the loss compares with.
        keys: one per image, fresh for this call.
        samples: draws of the function's noise; 0 for a function without any.

    Returns:
        Loss float32 [B] (-inf where it is not a number), fooled bool [B] (by the mean of the
        outputs), gradient like the images (0 where it is not finite).
    """

    def objective(x: Array, draw: Array | None) -> tuple[Array, tuple[Array, Any]]:
        outputs = function(x) if draw is None else function(x, draw)
        value = loss.value(outputs, target)
        return jnp.sum(value), (value, outputs)

    differentiate = jax.grad(objective, has_aux=True)
    if samples:
        drawn = lax.map(
            lambda i: differentiate(images, fold_in(keys, i)), jnp.arange(samples, dtype=jnp.int32)
        )
        gradient, (value, outputs) = jax.tree.map(lambda a: jnp.mean(a, axis=0), drawn)
    else:
        gradient, (value, outputs) = differentiate(images, None)
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
    return value, loss.fooled(outputs, target), gradient.astype(images.dtype)


def mean_outputs(function: Callable[..., Any], images: Array, keys: Array, samples: int = 0) -> Any:
    """``function(images)``, or the mean of ``function(images, keys)`` over ``samples`` draws."""
    if not samples:
        return function(images)
    draws = jnp.arange(samples, dtype=jnp.int32)
    drawn = lax.map(lambda i: function(images, fold_in(keys, i)), draws)
    return jax.tree.map(lambda a: jnp.mean(a, axis=0), drawn)


def fold_in(keys: Array, data: int | Array) -> Array:
    """A new key per image; ``data`` is one number, or one per image."""
    return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(keys, data)
