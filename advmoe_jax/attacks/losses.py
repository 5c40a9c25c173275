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
import numpy as np
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
    check_outputs(logits, labels, 1, "cross_entropy")
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if _is_soft(labels):
        beside = labels.reshape(len(labels), *(1,) * (logits.ndim - 2), -1)
        return -_per_image_sum(beside * log_probs)
    chosen = jnp.take_along_axis(log_probs, _beside(labels, logits)[..., None], axis=-1)
    return -_per_image_sum(chosen)


def margin(logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Largest wrong logit minus the right one (Carlini and Wagner, 2017), float32."""
    check_outputs(logits, labels, 2, "margin")
    logits = logits.astype(jnp.float32)
    right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    wrong = jnp.max(jnp.where(right, -jnp.inf, logits), axis=-1)
    return wrong - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]


def dlr(logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """Difference of logits ratio (Croce and Hein, 2020, eq. 6), float32; at least 3 classes."""
    check_outputs(logits, labels, 3, "dlr")
    ordered = jnp.sort(logits.astype(jnp.float32), axis=-1)
    return margin(logits, labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def dlr_targeted(logits: Logits, target: tuple[Labels, Labels]) -> Float[Array, " batch"]:
    """Targeted DLR (Croce and Hein, 2020, eq. 7), float32; at least 4 classes.

    ``target`` is (labels, classes to reach).
    """
    check_outputs(logits, target[0], 4, "dlr_targeted")
    ordered = jnp.sort(logits.astype(jnp.float32), axis=-1)
    scale = ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2
    return margin_targeted(logits, target) / (scale + 1e-12)


def margin_targeted(logits: Logits, target: tuple[Labels, Labels]) -> Float[Array, " batch"]:
    """The logit of the class to reach minus the right one, float32.

    ``target`` is (labels, classes to reach). Targeted DLR without its scale, for 2 and 3 classes.
    """
    check_outputs(logits, target[0], 2, "margin_targeted")
    logits = logits.astype(jnp.float32)
    right, wanted = (jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0] for t in target)
    return wanted - right


def kl(outputs: Outputs, clean: Outputs) -> Float[Array, " batch"]:
    """KL(softmax(clean) || softmax(outputs)), summed over the arrays of the tree, float32."""

    def one(scores: Array, reference: Array) -> Array:
        # One row per decision: rounding does not depend on how an image's decisions are arranged.
        rows = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (scores, reference))
        log_q, log_p = map(jax.nn.log_softmax, rows)
        of_rows = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return _per_image_sum(of_rows.reshape(len(scores), -1))

    return sum(jax.tree.leaves(jax.tree.map(one, outputs, clean)))


def check_outputs(logits: Any, labels: Any, least: int, loss: str = "") -> None:
    """Raises ValueError for outputs that are no logits of enough classes, or labels beyond them.

    Args:
        logits: what the function returns.
        labels: of the images; traced ones have no values to look at.
        least: the fewest classes that make sense.
        loss: the name of the loss that needs them.
    """
    if not hasattr(logits, "ndim"):
        raise ValueError(
            f"the function returns a {type(logits).__name__}: an attack on labels needs the logits "
            "alone, [batch, classes]; take them out, as in lambda x: function(x)[0]"
        )
    if logits.ndim < 2:
        raise ValueError(
            f"the function returns {logits.shape}: it must return logits [batch, classes]"
        )
    classes = logits.shape[-1]
    if classes < least:
        raise ValueError(
            f"{f'loss {loss!r}' if loss else 'this attack'} needs {least} classes, the function "
            f"has {classes}: "
            + ("choose cross_entropy or margin" if least > 2 else "give one logit per class")
        )
    if isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    if labels.size and not _is_soft(labels):
        known = np.asarray(labels)
        low, high = int(known.min()), int(known.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels reach from {low} to {high}, but the function has {classes} classes, "
                f"0 to {classes - 1}"
            )


def _per_image_sum(x: Array) -> Array:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _beside(labels: Array, scores: Array) -> Array:
    """Labels [B] -> [B, 1, ...], as many axes as ``scores`` has without its last."""
    return labels.reshape(labels.shape + (1,) * (scores.ndim - 2))


def _is_soft(labels: Array) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.floating)


def name_of(loss: Loss) -> str:
    """What a loss's function is called; another may be called the same."""
    return getattr(loss.value, "__qualname__", repr(loss.value))


def takes_labels(loss: Loss) -> bool:
    """Whether the loss compares logits with labels, as every loss here but ``kl`` does."""
    return any(loss is named for named in LOSSES.values()) and not loss.against_clean


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
    return ~misclassified(logits, wanted)


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
    "margin_targeted": Loss(
        margin_targeted, lambda logits, target: misclassified(logits, target[0])
    ),
}


def make_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    return LOSSES[name]
