"""Attacks on a network with several exits: on one, on all together, on the worst for all.

The function attacked gives a tuple, the logits of every exit, the main one last. From Hu et al.,
"Triple wins: boosting accuracy, robustness and efficiency together by enabling input-adaptive
inference", ICLR 2020, section 3: single attacks (eq. 3), the average attack (eq. 4) and the
max-average attack (eq. 5 and 6). None of them knows at which exit an image will leave.
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from advmoe_jax.attacks.constraints import AnyImages
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.losses import Loss, cross_entropy, misclassified
from advmoe_jax.attacks.pgd import Attack, per_image_keys
from advmoe_jax.attacks.stepwise import select
from advmoe_jax.types import Array, Labels, Logits

ExitLogits = tuple[Logits, ...]


def total_loss(exits: ExitLogits, labels: Labels) -> Float[Array, " batch"]:
    """The sum over all exits of the cross-entropy."""
    return sum(cross_entropy(logits, labels) for logits in exits)


def single(number: int) -> Loss:
    """The cross-entropy of one exit, counted from 0; -1: the main one (eq. 3)."""
    return Loss(
        lambda exits, labels: cross_entropy(exits[number], labels),
        lambda exits, labels: misclassified(exits[number], labels),
    )


def _all_fooled(exits: ExitLogits, labels: Labels) -> Array:
    return jnp.all(jnp.stack([misclassified(logits, labels) for logits in exits]), axis=0)


# The mean over the exits of the cross-entropy (eq. 4); it has won when every exit errs.
AVERAGE = Loss(lambda exits, labels: total_loss(exits, labels) / len(exits), _all_fooled)


def max_average(on_exit: Callable[[Loss], Attack]) -> Attack:
    """The strongest of all single attacks, per image (eq. 5 and 6).

    Each exit is attacked alone, from a start of its own; of the candidates, an image keeps the one
    with the largest sum over all exits of the cross-entropy, the first of equal ones.

    Args:
        on_exit: makes a single attack of its loss.
    """

    def attack(
        function: Callable[[AnyImages], ExitLogits],
        images: AnyImages,
        labels: Labels,
        key: Array,
        clean_outputs: ExitLogits | None = None,
    ) -> AnyImages:
        keys = per_image_keys(key, len(images))
        num_exits = len(jax.eval_shape(function, images))
        candidates = [
            on_exit(single(number))(function, images, labels, fold_in(keys, number))
            for number in range(num_exits)
        ]
        losses = [total_loss(function(candidate), labels) for candidate in candidates]
        return worst_for_all(candidates, losses)

    return attack


def worst_for_all(
    candidates: Sequence[AnyImages], losses: Sequence[Float[Array, " batch"]]
) -> AnyImages:
    """Per image the candidate with the largest loss, the first of equal ones; NaN is the least."""
    losses = [jnp.where(jnp.isnan(loss), -jnp.inf, loss) for loss in losses]
    best, worth = candidates[0], losses[0]
    for candidate, loss in zip(candidates[1:], losses[1:], strict=True):
        best = select(loss > worth, candidate, best)
        worth = jnp.maximum(loss, worth)
    return best


def on_exits(aim: str, make: Callable[[Loss], Attack]) -> Attack:
    """The attack on what it is aimed at.

    Args:
        aim: ``main``, a side exit such as ``exit1`` (the first), ``average``, ``max_average``.
        make: makes an attack of a loss, such as a ``partial`` of ``pgd``.

    Raises:
        ValueError: if there is no such aim.
    """
    if aim == "main":
        return make(single(-1))
    if aim == "average":
        return make(AVERAGE)
    if aim == "max_average":
        return max_average(make)
    if number := side_exit(aim):
        return make(single(number - 1))
    raise ValueError(f"{aim!r} is no aim: choose main, exit1 and so on, average or max_average")


def side_exit(aim: str) -> int:
    """The number, from 1, of the side exit that an aim names; 0 if it names none."""
    match = re.fullmatch(r"exit([1-9]\d?)", aim)
    return int(match[1]) if match else 0
