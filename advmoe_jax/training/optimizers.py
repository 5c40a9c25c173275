"""Optax optimizers and schedules."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax

from advmoe_jax.errors import UserError
from advmoe_jax.parallel import EXPERT_AXIS
from advmoe_jax.types import Tree

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "linear", "one_cycle", "constant", "drops")


class OptimizerSettings(NamedTuple):
    """An optimizer's values.

    Attributes:
        name: one of ``OPTIMIZERS``.
        learning_rate: the largest of the schedule.
        momentum: of ``sgd``; the first moment's decay of ``adam`` and ``adamw``.
        weight_decay: L2 regularisation, as torch.optim's; of ``adamw`` decoupled from the gradient
            (Loshchilov and Hutter, 2019), scaled by the learning rate, and of kernels alone, as in
            V-MoE's published code.
        schedule: one of ``SCHEDULES``, see ``learning_rate``.
        warmup_epochs: see ``learning_rate``.
        drops: of the schedule ``drops``: shares of the run, ascending.
        clip_norm: gradients of a larger global norm are scaled down to it; 0: none.
    """

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    drops: tuple[float, ...] = ()
    clip_norm: float = 0.0


def learning_rate(
    settings: OptimizerSettings, steps_per_epoch: int, num_epochs: int
) -> optax.Schedule:
    """The learning rate of every step.

    ``cosine`` (Loshchilov and Hutter, 2017), ``linear`` and ``constant``: linear warm-up over
    ``warmup_epochs``, then down to zero at the last step, or level. ``one_cycle`` (Smith and Topin,
    2018): from 1/25 of the rate up to it, by a cosine, over ``warmup_epochs`` (0: the first 30%
    of the steps), then down to 1/250,000. ``drops``: as ``constant``, divided by 10 after each of
    the shares ``drops`` of all steps.
    """
    total = max(steps_per_epoch * num_epochs, 1)
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total - 1)
    if settings.schedule == "one_cycle":
        # A cycle has a step up and a step down at least.
        total = max(total, 2)
        rising = min(max(warmup or round(0.3 * total), 1), total - 1)
        # optax truncates the product: half a step more, and rounding does no harm.
        share = (rising + 0.5) / total
        return optax.cosine_onecycle_schedule(total, settings.learning_rate, share)
    if settings.schedule == "cosine":
        main = optax.cosine_decay_schedule(settings.learning_rate, total - warmup)
    elif settings.schedule == "linear":
        main = optax.linear_schedule(settings.learning_rate, 0.0, total - warmup)
    else:
        main = optax.constant_schedule(settings.learning_rate)
        if settings.schedule == "drops":
            # In a short run several may fall on one step.
            at = Counter(round(share * total) - warmup for share in settings.drops)
            scales = {step: 0.1**count for step, count in at.items()}
            main = optax.piecewise_constant_schedule(settings.learning_rate, scales)
    if warmup == 0:
        return main
    rise = optax.linear_schedule(0.0, settings.learning_rate, warmup)
    return optax.join_schedules([rise, main], [warmup])


def clip_by_global_norm(max_norm: float, sharded: Tree) -> optax.GradientTransformation:
    """``optax.clip_by_global_norm`` of gradients some of which are a device's part of theirs.

    Args:
        max_norm: gradients of a larger global norm are scaled down to it.
        sharded: which of them are spread over the mesh's axis ``expert``, a tree of booleans.
    """

    def update(gradients: Tree, state: optax.OptState, params: Tree | None = None) -> Any:
        del params
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(sharded), strict=True)
        squares = {False: jnp.zeros(()), True: jnp.zeros(())}
        for gradient, is_sharded in pairs:
            squares[is_sharded] += jnp.sum(jnp.square(gradient))
        norm = jnp.sqrt(squares[False] + lax.psum(squares[True], EXPERT_AXIS))
        scale = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def create_optimizer(
    group: str,
    settings: OptimizerSettings,
    steps_per_epoch: int,
    num_epochs: int,
    sharded: Tree | None = None,
) -> optax.GradientTransformation:
    """An optimizer.

    Args:
        group: what the settings are called in a config, for messages.
        settings: what it is.
        steps_per_epoch: steps in one epoch.
        num_epochs: length of the schedule.
        sharded: see ``clip_by_global_norm``; None: every device has whole gradients.

    Raises:
        UserError: if a value is not one that can be used.
    """
    values = settings._asdict()
    for field, valid in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if values[field] not in valid:
            raise UserError(
                f"optimizer.{group}.{field}={values[field]!r} is unknown; "
                f"choose one of {', '.join(valid)}"
            )
    if settings.learning_rate <= 0:
        raise UserError(
            f"optimizer.{group}.learning_rate={settings.learning_rate} must be positive"
        )
    for field in ("weight_decay", "warmup_epochs", "clip_norm"):
        if values[field] < 0:
            raise UserError(f"optimizer.{group}.{field}={values[field]} must not be negative")
    drops = list(settings.drops)
    if bool(drops) != (settings.schedule == "drops"):
        raise UserError(
            f"optimizer.{group}.drops={tuple(drops)} and optimizer.{group}.schedule="
            f"{settings.schedule!r} do not go together: shares of the run are for schedule='drops'"
        )
    if drops != sorted(set(drops)) or not all(0 < share < 1 for share in drops):
        raise UserError(
            f"optimizer.{group}.drops={tuple(drops)} must be shares of the run, ascending in (0, 1)"
        )
    rate = learning_rate(settings, steps_per_epoch, num_epochs)
    clip = []
    if settings.clip_norm and sharded is None:
        clip = [optax.clip_by_global_norm(settings.clip_norm)]
    elif settings.clip_norm:
        clip = [clip_by_global_norm(settings.clip_norm, sharded)]
    if settings.name == "adamw":
        decay = {"weight_decay": settings.weight_decay, "mask": _kernels}
        return optax.chain(*clip, optax.adamw(rate, b1=settings.momentum, **decay))
    if settings.name == "sgd":
        rule = optax.sgd(rate, momentum=settings.momentum or None)
    else:
        rule = optax.adam(rate, b1=settings.momentum)
    # L2 regularisation enters the gradient, as torch.optim's weight_decay does.
    return optax.chain(*clip, optax.add_decayed_weights(settings.weight_decay), rule)


def _kernels(params: Tree) -> Tree:
    """Which parameters are kernels, by their names."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] == "kernel" for path in flat})
