"""Optax optimizers and schedules from a config."""

import optax
from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.training.state import Optimizers

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("cosine", "one_cycle", "constant")


def create_optimizers(
    config: ConfigDict, steps_per_epoch: int, num_epochs: int, pruning_epochs: int = 0
) -> Optimizers:
    """The optimizers of both subtrees from ``config.optimizer``.

    Args:
        config: the ``optimizer`` part of a config, with branches ``router`` and ``experts``.
        steps_per_epoch: steps in one epoch.
        num_epochs: length of the schedules.
        pruning_epochs: if positive, the first so many epochs are those of ``router`` (a Sparse
            network's scores), the others those of ``experts``.
    """
    lengths = {"router": num_epochs, "experts": num_epochs}
    if pruning_epochs:
        lengths = {"router": pruning_epochs, "experts": num_epochs - pruning_epochs}
    return Optimizers(
        *(
            _optimizer(name, config[name], steps_per_epoch, lengths[name])
            for name in Optimizers._fields
        )
    )


def learning_rate(config: ConfigDict, steps_per_epoch: int, num_epochs: int) -> optax.Schedule:
    """The learning rate of every step.

    ``cosine`` (Loshchilov and Hutter, 2017) and ``constant``: linear warm-up over
    ``warmup_epochs``, then down to zero at the last step, or level. ``one_cycle`` (Smith and Topin,
    2018): from 1/25 of the rate up to it, by a cosine, over ``warmup_epochs`` (0: the first 30%
    of the steps), then down to 1/250,000.
    """
    total = max(steps_per_epoch * num_epochs, 1)
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    if config.schedule == "one_cycle":
        # A cycle has a step up and a step down at least.
        total = max(total, 2)
        rising = min(max(warmup or round(0.3 * total), 1), total - 1)
        # optax truncates the product: half a step more, and rounding does no harm.
        share = (rising + 0.5) / total
        return optax.cosine_onecycle_schedule(total, config.learning_rate, share)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.learning_rate, total - warmup)
    else:
        main = optax.constant_schedule(config.learning_rate)
    if warmup == 0:
        return main
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    return optax.join_schedules([rise, main], [warmup])


def _optimizer(
    name: str, config: ConfigDict, steps_per_epoch: int, num_epochs: int
) -> optax.GradientTransformation:
    for field, valid in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
        if config[field] not in valid:
            raise UserError(
                f"optimizer.{name}.{field}={config[field]!r} is unknown; "
                f"choose one of {', '.join(valid)}"
            )
    if config.learning_rate <= 0:
        raise UserError(f"optimizer.{name}.learning_rate={config.learning_rate} must be positive")
    for field in ("weight_decay", "warmup_epochs", "clip_norm"):
        if config[field] < 0:
            raise UserError(f"optimizer.{name}.{field}={config[field]} must not be negative")
    rate = learning_rate(config, steps_per_epoch, num_epochs)
    if config.name == "sgd":
        rule = optax.sgd(rate, momentum=config.momentum or None)
    else:
        rule = optax.adam(rate, b1=config.momentum)
    # L2 regularisation enters the gradient, as torch.optim's weight_decay does.
    decay = optax.add_decayed_weights(config.weight_decay)
    if not config.clip_norm:
        return optax.chain(decay, rule)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), decay, rule)
