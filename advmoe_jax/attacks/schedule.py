"""APGD's schedule: when to look back, and when to halve the step (Croce and Hein, ICML 2020)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from advmoe_jax.types import Array


def checkpoints(num_steps: int) -> tuple[int, ...]:
    """The steps after which the step size is reconsidered (section 3.2).

    ``ceil(p_j * num_steps)`` with p_0 = 0, p_1 = 0.22 and
    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) up to 1; for 100 steps
    22, 41, 57, 70, 80, 87, 93, 99.
    """
    before, now = 0, 22  # in hundredths, which floating point would not add up exactly
    steps = []
    while now <= 100:
        steps.append(-(-now * num_steps // 100))
        before, now = now, now + max(now - before - 3, 6)
    return tuple(sorted(set(steps)))


def windows(steps: tuple[int, ...], num_steps: int) -> np.ndarray:
    """Steps since the checkpoint before, at each checkpoint; 0 elsewhere; int32 [num_steps + 1]."""
    result = np.zeros(num_steps + 1, np.int32)
    result[list(steps)] = np.diff([0, *steps])
    return result


class Timetable(NamedTuple):
    """What each step of a run is, an array of steps (of images, for ``at``).

    Attributes:
        window: int32, steps since the checkpoint before, at each checkpoint; 0 elsewhere.
        radius: float32, of the ball, in units of epsilon.
        step: int32, the number of the step in its ball.
        is_last: bool, whether it is the last in a ball that another follows.
    """

    window: Array
    radius: Array
    step: Array
    is_last: Array

    def at(self, count: Array) -> "Timetable":
        """Of the steps of these numbers, int32 [B]; the last one of those beyond."""
        count = jnp.minimum(count, len(self.step) - 1)
        return Timetable(*(jnp.asarray(row)[count] for row in self))


def timetable(num_steps: int, *, sparse: bool = False, shrinking: bool = False) -> Timetable:
    """The whole run: ``num_steps`` gradient steps, and one look more in each ball.

    ``sparse`` has the checkpoints of l1, ``shrinking`` its three balls.
    """
    first = min(-(-3 * num_steps // 10), (num_steps - 1) // 2) if shrinking else 0
    rows = []
    for radius, steps in ((3, first), (2, first), (1, num_steps - 2 * first)):
        if not steps:
            continue
        at = range(interval := max(steps // 25, 1), steps + 1, interval)
        window = windows(tuple(at) if sparse else checkpoints(steps), steps)
        number = np.arange(steps + 1, dtype=np.int32)
        is_last = (number == steps) & (radius > 1)
        rows.append((window, np.full(steps + 1, radius, np.float32), number, is_last))
    return Timetable(*map(np.concatenate, zip(*rows, strict=True)))


def should_halve(
    raised: Array,
    window: Array,
    halved_before: Array,
    best_loss_before: Array,
    best_loss: Array,
    rho: float = 0.75,
) -> Array:
    """Whether an image's step is too long, at a checkpoint (conditions 1 and 2), bool [B].

    Args:
        raised: int [B], steps since the checkpoint before that raised the loss.
        window: int [B], all steps since then; 0 is no checkpoint, and gives False.
        halved_before: bool [B], whether the step was halved at that checkpoint.
        best_loss_before: float [B], the best loss at that checkpoint.
        best_loss: float [B], the best loss now.
        rho: the share of steps that must raise the loss.
    """
    too_few = raised < rho * window
    stuck = ~halved_before & (best_loss <= best_loss_before)
    return (window > 0) & (too_few | stuck)


def sparsify(
    changed: Array, changed_before: Array, size: int, step_size: Array, largest_step: Array
) -> tuple[Array, Array, Array]:
    """l1-APGD's adaption of sparsity and step (Croce and Hein, ICML 2021, section 4.1).

    Args:
        changed: [B], pixels that differ from the clean image at the best point.
        changed_before: [B], the same at the checkpoint before.
        size: pixels of an image.
        step_size: float [B].
        largest_step: the step of the beginning.

    Returns:
        The share of pixels the next steps move, the next step size, and whether the image
        starts again from its best point.
    """
    sparser = changed < 0.95 * changed_before
    shorter = jnp.maximum(step_size / 1.5, largest_step / 10)
    return changed / size / 1.5, jnp.where(sparser, largest_step, shorter), sparser
