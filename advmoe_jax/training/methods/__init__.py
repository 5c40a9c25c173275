"""Training methods by name, and the step of one.

A method is one record in a file of its family; what is listed here can be trained, and nothing
else knows a method by its name.
"""

from advmoe_jax.attacks import Attack
from advmoe_jax.attacks.in_training import InTraining
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.training import balance
from advmoe_jax.training.methods.adversarial import AT, STANDARD, TRADES
from advmoe_jax.training.methods.advmoe import ADVMOE, JOINT
from advmoe_jax.training.methods.hydra import HYDRA
from advmoe_jax.training.methods.microbatches import in_microbatches
from advmoe_jax.training.methods.multi_exit import MULTI_EXIT
from advmoe_jax.training.methods.step import (
    AttackSettings,
    ExitSettings,
    Method,
    Settings,
    Setup,
    Step,
    routing_metrics,
)
from advmoe_jax.training.state import Optimizers, TrainState, update_average
from advmoe_jax.types import Array, Axes, Tree

__all__ = [
    "METHODS",
    "AttackSettings",
    "ExitSettings",
    "Method",
    "Settings",
    "Step",
    "create_step",
    "method",
    "routing_metrics",
]

METHODS: dict[str, Method] = {
    "standard": STANDARD,
    "at": AT,
    "trades": TRADES,
    "hydra": HYDRA,
    "joint": JOINT,
    "advmoe": ADVMOE,
    "multi_exit": MULTI_EXIT,
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: if there is none.
    """
    if name not in METHODS:
        raise UserError(f"method={name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def create_step(
    name: str,
    network: Network,
    optimizers: Optimizers,
    attack: Attack | InTraining,
    settings: Settings,
    axis_name: Axes | None = None,
    microbatches: int = 1,
) -> Step:
    """The step of a method.

    Args:
        name: one of ``METHODS``.
        network: functional form of the model.
        optimizers: of every part of the network.
        attack: the training attack; its loss must be the method's ``attack_loss``.
        settings: weights of the losses.
        axis_name: mapped axis over which the batch is spread, if any.
        microbatches: into how many parts a device's batch is cut to save memory. Gradients are
            those of the whole batch, up to rounding and to what BatchNorm makes of it: every part
            is normalised with its own statistics, and moves the running ones. Balancing losses
            are means over the parts.

    Raises:
        UserError: if the method is unknown, the network does not suit it, or settings do not go
            together.
    """
    chosen = method(name)
    halves = [part for part in network.parts if part in ("experts", "router")]
    if settings.frozen and (settings.frozen not in halves or name != "advmoe"):
        raise UserError(
            f"start.frozen={settings.frozen!r} must be 'router', 'experts' or empty, and needs "
            f"method='advmoe', which trains one half at a time, not {name!r}"
        )
    if settings.consistency and name != "advmoe":
        raise UserError(
            f"loss.consistency={settings.consistency} is of method='advmoe', not {name!r}: set it "
            "to 0"
        )
    _check_mode(name, settings.exits.attack_mode)
    chosen.check(network, settings)
    balance.check(settings.balance, network.gate)
    if not isinstance(attack, InTraining):
        attack = in_microbatches(attack, microbatches)
    elif microbatches > 1:
        raise UserError(
            f"attack.mode='train' follows statistics from pass to pass: it needs microbatches=1, "
            f"not {microbatches}"
        )
    step = chosen.build(Setup(network, optimizers, attack, settings, axis_name, microbatches))
    return _averaging(step, settings) if settings.ema_decay else step


def _check_mode(name: str, mode: str) -> None:
    """Raises UserError if a method's attack cannot be made in that mode."""
    if mode != "inference" and METHODS[name].own_attack is None:
        known = " or ".join(repr(key) for key, value in METHODS.items() if value.own_attack)
        raise UserError(
            f"attack.mode={mode!r} is of method={known}: method={name!r} attacks in "
            "'inference' mode"
        )


def _averaging(step: Step, settings: Settings) -> Step:
    def averaging(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        state, metrics = step(state, images, labels, keys)
        return update_average(state, settings.ema_decay, settings.pruning_steps), metrics

    return averaging
