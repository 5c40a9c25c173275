"""The l2 attack of Carlini and Wagner.

Carlini and Wagner, "Towards evaluating the robustness of neural networks", IEEE S&P 2017,
section VI-A.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from advmoe_jax.attacks.admissible import check_images, check_labels
from advmoe_jax.attacks.constraints import Threat, distance
from advmoe_jax.attacks.loops import repeat
from advmoe_jax.attacks.losses import margin
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import select
from advmoe_jax.types import Array


class _Search(NamedTuple):
    """The binary search for the weight of the loss, per image, and the best image so far."""

    weight: Array
    lower: Array
    upper: Array
    best: Array
    nearest: Array


def cw(
    threat: Threat,
    *,
    num_steps: int = 1000,
    binary_search_steps: int = 9,
    learning_rate: float = 0.01,
    initial_weight: float = 0.001,
    confidence: float = 0.0,
    targeted: bool = False,
) -> Attack:
    """C&W; the result is the nearest adversarial image found in the ball, or the clean image.

    Adam minimises ``||x' - x||^2 + weight * max(-margin + confidence, 0)`` over images written
    as tanh, so that they stay in the pixel range.

    Args:
        threat: l2; the radius only decides what is returned.
        num_steps: steps of Adam per weight.
        binary_search_steps: weights tried.
        learning_rate: Adam's.
        initial_weight: the first weight; ten times more until one succeeds, then bisection.
        confidence: by how much the wrong logit must exceed the right one.
        targeted: the labels are classes to reach.

    Raises:
        ValueError: if a setting is not valid.
    """
    if threat.norm != "l2":
        raise ValueError(f"this attack is defined for l2, not for {threat.norm}")
    if min(num_steps, binary_search_steps) < 1 or not min(learning_rate, initial_weight) > 0:
        raise ValueError(
            f"num_steps={num_steps}, binary_search_steps={binary_search_steps}, "
            f"learning_rate={learning_rate} and initial_weight={initial_weight} must be positive"
        )
    middle, half = (threat.upper + threat.lower) / 2, (threat.upper - threat.lower) / 2
    optimizer = optax.adam(learning_rate)
    sign = -1.0 if targeted else 1.0

    def attack(
        function: Callable[[Array], Array],
        images: Array,
        labels: Array,
        key: Array,
        clean_outputs: Any = None,
    ) -> Array:
        del key, clean_outputs  # nothing is drawn
        check_images(threat, images, is_boundless=True)
        check_labels(images, labels)
        axes = tuple(range(1, images.ndim))
        # Pixels may lie beyond the range by rounding; an arctanh there would be NaN.
        origin = jnp.arctanh(jnp.clip((images - middle) / half, -1, 1) * 0.999999)

        def image(shift: Array) -> Array:
            return jnp.tanh(origin + shift) * half + middle

        def objective(shift: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
            moved = image(shift)
            gain = sign * margin(function(moved), labels)
            squared = jnp.sum(jnp.square(moved - image(jnp.zeros_like(shift))), axis=axes)
            value = squared + weight * jnp.maximum(confidence - gain, 0)
            return jnp.sum(value), (moved, gain)

        def search(_: Array, found: _Search) -> _Search:
            def step(_: Array, carry: Any) -> Any:
                shift, state, best, nearest, succeeded = carry
                gradient, (moved, gain) = jax.grad(objective, has_aux=True)(shift, found.weight)
                gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
                updates, state = optimizer.update(gradient, state)
                moved = jnp.clip(moved, threat.lower, threat.upper)
                success = (gain > 0) & (gain >= confidence)
                far = distance(threat, moved, images)
                nearer = success & (far < nearest)
                return (
                    optax.apply_updates(shift, updates),
                    state,
                    select(nearer, moved, best),
                    jnp.where(nearer, far, nearest),
                    succeeded | success,
                )

            shift, none = jnp.zeros_like(images), jnp.zeros_like(found.nearest, bool)
            start = shift, optimizer.init(shift), found.best, found.nearest, none
            _, _, best, nearest, succeeded = repeat(num_steps, step, start)
            upper = jnp.where(succeeded, found.weight, found.upper)
            lower = jnp.where(succeeded, found.lower, found.weight)
            halfway = (lower + upper) / 2
            weight = jnp.where(jnp.isinf(upper), 10 * found.weight, halfway)
            return _Search(weight, lower, upper, best, nearest)

        zeros = jnp.zeros_like(images, jnp.float32, shape=images.shape[:1])
        infinite = zeros + jnp.inf
        start = _Search(zeros + initial_weight, zeros, infinite, images, infinite)
        found = repeat(binary_search_steps, search, start)
        return lax.stop_gradient(select(found.nearest <= threat.epsilon, found.best, images))

    return attack
