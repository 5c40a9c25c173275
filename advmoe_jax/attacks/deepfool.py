"""DeepFool: to the nearest boundary of the linearised classifier, until the label changes.

Moosavi-Dezfooli, Fawzi and Frossard, "DeepFool: a simple and accurate method to fool deep neural
networks", CVPR 2016, algorithm 2 (l2) and section 3.3 (other norms).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.admissible import check_images, check_labels
from advmoe_jax.attacks.constraints import Threat, distance, steepest
from advmoe_jax.attacks.loops import repeat
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import likely_wrong, logit_gap, select
from advmoe_jax.types import Array


def deepfool(
    threat: Threat, *, num_steps: int = 50, overshoot: float = 0.02, candidates: int = 10
) -> Attack:
    """DeepFool; the result is the adversarial image it finds in the ball, or the clean image.

    Args:
        threat: linf or l2; the radius only decides what is returned.
        num_steps: linearisations.
        overshoot: how much farther than to the boundary the whole perturbation goes, relative.
        candidates: classes looked at, the label and the most likely others on the clean image;
            cut to the classes there are.

    Raises:
        ValueError: if a setting is not valid.
    """
    if threat.norm not in ("linf", "l2"):
        raise ValueError(f"DeepFool is defined for linf and l2, not for {threat.norm}")
    if num_steps < 1 or candidates < 2 or overshoot < 0:
        raise ValueError(
            f"num_steps={num_steps} must be positive, candidates={candidates} at least 2, "
            f"overshoot={overshoot} at least 0"
        )

    def attack(
        function: Callable[[Array], Array],
        images: Array,
        labels: Array,
        key: Array,
        clean_outputs: Any = None,
    ) -> Array:
        del key  # nothing is drawn
        check_images(threat, images, is_boundless=True)
        check_labels(images, labels)
        labels = jnp.asarray(labels, jnp.int32)
        clean_outputs = function(images) if clean_outputs is None else clean_outputs
        classes = likely_wrong(clean_outputs, labels)[:, : candidates - 1]
        axes = tuple(range(1, images.ndim))

        def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            moved, total = carry
            logits, pull = jax.vjp(function, moved)
            done = jnp.argmax(logits, axis=-1) != labels
            right = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)

            def compare(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
                wanted = lax.dynamic_index_in_dim(classes, i, 1, keepdims=False)
                towards = jax.nn.one_hot(wanted, logits.shape[-1], dtype=logits.dtype) - right
                normal = pull(towards)[0]
                unit = steepest(threat, jnp.where(jnp.isfinite(normal), normal, 0))
                slope = jnp.sum(normal * unit, axis=axes)
                gap = jnp.abs(logit_gap(logits, labels, wanted))
                far = jnp.where(slope > 0, gap / slope, jnp.inf).astype(jnp.float32)
                return select(far < best[0], (far, unit), best)

            none = jnp.full_like(images, jnp.inf, jnp.float32, images.shape[:1])
            far, unit = repeat(classes.shape[1], compare, (none, jnp.zeros_like(images)))
            # A little more, or the last steps would never cross the boundary.
            length = jnp.where(jnp.isfinite(far), far + 1e-4, 0)
            length = length.reshape(far.shape + (1,) * len(axes)).astype(images.dtype)
            total = select(done, total, total + length * unit)
            ahead = jnp.clip(images + (1 + overshoot) * total, threat.lower, threat.upper)
            return select(done, moved, ahead), total

        moved = repeat(num_steps, step, (images, jnp.zeros_like(images)))[0]
        wrong = jnp.argmax(function(moved), axis=-1) != labels
        found = wrong & (distance(threat, moved, images) <= threat.epsilon)
        return lax.stop_gradient(select(found, moved, images))

    return attack
