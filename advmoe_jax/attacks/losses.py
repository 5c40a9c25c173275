"""What an attacker maximises.

A loss compares the outputs of the attacked function with a target, per image. The target is the
labels, or the function's own outputs on the clean images. Outputs may be any tree of score arrays
[B, K], or [B, L, K] for L decisions per image, over which losses are summed: an attack on
``(logits, router_scores)`` with the ``kl`` loss is AdvMoE's joint attack.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from advmoe_jax.types import Array, Labels, Logits

Outputs = Any


class Loss(NamedTuple):
    """A loss of the attacker.

    Attributes:
        value: (outputs, target) -> float32 [B], larger is better for the attacker.
        fooled: (outputs, target) -> bool [B], whether the attack has reached its aim.
        against_clean: the target is the outputs on the clean images, not the labels.
    """

    value: Callable[[Outputs, Any], Array]
    fooled: Callable[[Outputs, Any], Array]
    against_clean: bool = False


def cross_entropy(
    logits: Float[Array, "batch *decisions classes"],
    labels: Labels | Float[Array, "batch classes"],
) -> Float[Array, " batch"]:
    """-log softmax(logits)[labels], float32, summed over decisions if there are several.

    Labels may be distributions over the classes.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if _is_soft(labels):
        beside = labels.reshape(len(labels), *(1,) * (logits.ndim - 2), -1)
        return -_per_image_sum(beside * log_probs)
    chosen = jnp.take_along_axis(log_probs, _beside(labels, logits)[..., None], axis=-1)
    return -_per_image_sum(chosen)


def margin(logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Largest wrong logit minus the right one (Carlini and Wagner, 2017), float32."""
    logits = logits.astype(jnp.float32)
    right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    wrong = jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1)
    return wrong - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def dlr(logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Difference of logits ratio (Croce and Hein, 2020, eq. 6), float32; at least 3 classes."""
    ordered = jnp.sort(logits.astype(jnp.float32), axis=-1)
    return margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits: Logits, target: tuple[Labels, Labels]) -> Float[Array, " batch"]:
    """Targeted DLR (Croce and Hein, 2020, eq. 7), float32; at least 4 classes.

    ``target`` is (labels, classes to reach).
    """
    logits = logits.astype(jnp.float32)
    ordered = jnp.sort(logits, axis=-1)
    right, wanted = (jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0] for t in target)
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return (wanted - right) / (scale + 1e-12)


def kl(outputs: Outputs, clean: Outputs) -> Float[Array, " batch"]:
    """KL(softmax(clean) || softmax(outputs)), summed over the arrays of the tree, float32."""

    def one(scores: Array, reference: Array) -> Array:
        # One row per decision: rounding does not depend on how an image's decisions are arranged.
        rows = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (scores, reference))
        log_q, log_p = map(jax.nn.log_softmax, rows)
        of_rows = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return _per_image_sum(of_rows.reshape(len(scores), -1))

    return sum(jax.tree.leaves(jax.tree.map(one, outputs, clean)))


def _per_image_sum(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _beside(labels: Array, scores: Array) -> Array:
    """Labels [B] -> [B, 1, ...], as many axes as ``scores`` has without its last."""
    return labels.reshape(labels.shape + (1,) * (scores.ndim - 2))


def _is_soft(labels: Array) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.floating)


def misclassified(logits: Array, labels: Array) -> Array:
    """Whether the largest logit is not the label's, in any decision if there are several; [B]."""
    labels = jnp.argmax(labels, axis=-1) if _is_soft(labels) else labels
    wrong = jnp.argmax(logits, axis=-1) != _beside(labels, logits)
    return jnp.any(wrong.reshape(wrong.shape[0], -1), axis=-1)


def _changed(outputs: Outputs, clean: Outputs) -> Array:
    """Whether the largest score of any array has moved."""
    moved = jax.tree.map(lambda a, b: jnp.argmax(a, -1) != jnp.argmax(b, -1), outputs, clean)
    flat = [m.reshape(m.shape[0], -1) for m in jax.tree.leaves(moved)]
    return jnp.any(jnp.concatenate(flat, axis=-1), axis=-1)


def _reached(logits: Array, wanted: Array) -> Array:
    return jnp.argmax(logits, axis=-1) == wanted


def targeted(loss: Loss) -> Loss:
    """The same loss when the labels are the classes to reach, not those to leave."""
    return Loss(lambda outputs, wanted: -loss.value(outputs, wanted), _reached)


LOSSES = {
    "cross_entropy": Loss(cross_entropy, misclassified),
    "margin": Loss(margin, misclassified),
    "dlr": Loss(dlr, misclassified),
    "kl": Loss(kl, _changed, against_clean=True),
}
LOSSES["ce"] = LOSSES["cross_entropy"]


# Their target is (labels, classes to head for); any error is a success.
TARGETED_LOSSES = {
    "ce_targeted": Loss(
        lambda logits, target: -cross_entropy(logits, target[1]),
        lambda logits, target: misclassified(logits, target[0]),
    ),
    "dlr_targeted": Loss(dlr_targeted, lambda logits, target: misclassified(logits, target[0])),
}


def make_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
