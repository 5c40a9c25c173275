"""PGD on a network in training mode, which changes while it is looked at.

RDI-Nets makes the images it trains on so (Hu et al., ICLR 2020, published code): with statistics of
the batch, running averages moved by every pass, dropout drawn anew in each. Such a function is not
one of every image alone, and what it remembers goes from pass to pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.constraints import AnyImages, Threat, project, steepest, uniform_start
from advmoe_jax.attacks.exits import (
    AVERAGE,
    ExitLogits,
    side_exit,
    single,
    total_loss,
    worst_for_all,
)
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.losses import Loss
from advmoe_jax.types import Array, Labels

# (images, memory, number of the pass) -> exits, memory
Changing = Callable[[AnyImages, Any, int | Array], tuple[ExitLogits, Any]]
Result = tuple[AnyImages, Any]


def pgd_in_training(
    threat: Threat,
    loss: Loss,
    function: Changing,
    images: AnyImages,
    labels: Labels,
    keys: Array,
    memory: Any,
    *,
    num_steps: int,
    step_size: float,
    first_pass: int = 0,
) -> Result:
    """PGD from a uniform start; returns the last images, and the memory after ``num_steps`` passes.

    Args:
        threat: the ball and the pixel range.
        loss: what is maximised.
        function: what is attacked.
        images: clean.
        labels: of the images.
        keys: one per image, for the start.
        memory: what the function remembers.
        num_steps: gradient steps.
        step_size: of one, in units of the pixel range.
        first_pass: how many passes came before.
    """

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        at, memory = carry

        def objective(x: Array) -> tuple[Array, Any]:
            exits, after = function(x, memory, first_pass + i)
            return jnp.sum(loss.value(exits, labels)), after

        gradient, memory = jax.grad(objective, has_aux=True)(at)
        return project(threat, at + step_size * steepest(threat, gradient), images), memory

    begin = uniform_start(threat, images, keys), memory
    return lax.stop_gradient(lax.fori_loop(0, num_steps, step, begin))


class InTraining(NamedTuple):
    """As ``exits.on_exits``, on a network in training mode.

    The passes of max-average are those of every single attack, exit by exit, and then one for each
    candidate whose losses are summed.

    Attributes:
        aim: see ``exits.on_exits``.
        threat: the ball and the pixel range.
        num_steps: gradient steps.
        step_size: of one, in units of the pixel range.
    """

    aim: str
    threat: Threat
    num_steps: int
    step_size: float

    def __call__(
        self,
        function: Changing,
        images: AnyImages,
        labels: Labels,
        keys: Array,
        memory: Any,
        num_exits: int,
    ) -> Result:
        """The images that are found, and the memory after the last pass."""
        candidates, losses = [], []
        aims = self._losses(num_exits)
        for number, loss in enumerate(aims):
            found, memory = pgd_in_training(
                *(self.threat, loss, function, images, labels, fold_in(keys, number), memory),
                num_steps=self.num_steps,
                step_size=self.step_size,
                first_pass=number * self.num_steps,
            )
            candidates.append(found)
        if len(candidates) == 1:
            return candidates[0], memory
        for number, found in enumerate(candidates):
            exits, memory = function(found, memory, len(aims) * self.num_steps + number)
            losses.append(total_loss(exits, labels))
        return worst_for_all(candidates, losses), memory

    def _losses(self, num_exits: int) -> list[Loss]:
        if self.aim == "max_average":
            return [single(number) for number in range(num_exits)]
        return [AVERAGE if self.aim == "average" else single(side_exit(self.aim) - 1)]
