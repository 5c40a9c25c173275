"""RDI-Nets' training of a network with side exits (Hu et al., ICLR 2020), and of one without.

L = sum over exits i of w_i [1/2 CE(f_i(x), y) + 1/2 CE(f_i(x'), y)], x' from an attack on the main
exit, on one side exit, on the average of all or on the worst for all (max-average). Clean and
attacked images go through the network separately. A network without side exits has the main one.
"""

from collections.abc import Callable
from typing import Any

from advmoe_jax.attacks import pgd
from advmoe_jax.attacks.exits import ExitLogits, on_exits, side_exit
from advmoe_jax.attacks.in_training import InTraining
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import Output
from advmoe_jax.training.methods.step import (
    AttackSettings,
    Method,
    Settings,
    Setup,
    Step,
    accuracy,
    added,
    fold,
)
from advmoe_jax.training.state import TrainState
from advmoe_jax.types import Array, Labels, Tree

AIMS = ("none", "main", "exit<number>", "average", "max_average")
MODES = ("inference", "train")
# Numbers that keys are folded with; 0, 1 and 2 are others'.
_CLEAN, _ATTACKED, _PASSES = 3, 4, 5


def _multi_exit(setup: Setup) -> Step:
    settings = setup.settings.exits

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, keys, noise = batch
        passes = {"train": True, "noise": added(noise), "axis_name": setup.axis_name}

        def answer(stats: Tree, x: Array, number: int) -> tuple[Output, Tree]:
            return setup.network.apply(params, stats, x, keys=fold(keys, number), **passes)

        natural, stats = answer(stats, images, _CLEAN)
        attacked = natural
        if adversarial is not None:
            attacked, stats = answer(stats, adversarial, _ATTACKED)
        losses = [
            OBJECTIVES[settings.objective](setup, clean, under_attack, labels)
            for clean, under_attack in zip(exits_of(natural), exits_of(attacked), strict=True)
        ]
        weights = settings.weights or (1.0,) * len(losses)
        loss = sum(weight * value for weight, value in zip(weights, losses, strict=True))
        return setup.balanced(loss, natural.routing, noise), (stats, (natural, attacked))

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = setup.noise(state, keys)
        adversarial = None
        if settings.defence != "none":
            state, adversarial = MAKERS[settings.attack_mode](
                setup, state, images, labels, keys, noise
            )
        batch = (images, adversarial, labels, keys, noise)
        new, loss, (natural, attacked) = setup.descend(state, loss_fn, setup.network.parts, batch)
        metrics = {"loss": loss, "standard_accuracy": accuracy(natural.logits, labels)}
        if adversarial is not None:
            metrics["robust_accuracy"] = accuracy(attacked.logits, labels)
        return setup.finish(new, metrics | setup.routing_metrics(natural.routing, attacked.routing))

    return step


def exits_of(output: Output) -> ExitLogits:
    """The logits of every exit, the main one last."""
    return output.exits or (output.logits,)


def _halves(setup: Setup, clean: Array, attacked: Array, labels: Labels) -> Array:
    """1/2 CE(f(x), y) + 1/2 CE(f(x'), y), a mean over the batch."""
    return (setup.classification(clean, labels) + setup.classification(attacked, labels)) / 2


def _trades(setup: Setup, clean: Array, attacked: Array, labels: Labels) -> Array:
    """CE(f(x), y) + beta KL(f(x) || f(x')), a mean over the batch."""
    return setup.trades_loss(clean, attacked, labels)


OBJECTIVES: dict[str, Callable[..., Array]] = {"halves": _halves, "trades": _trades}


def _in_inference_mode(
    setup: Setup, state: TrainState, images: Array, labels: Array, keys: Array, noise: Any
) -> tuple[TrainState, Array]:
    def function(x: Array, noise: Any) -> ExitLogits:
        return exits_of(setup.infer(state, x, noise))

    return state, setup.attack(function, images, labels, keys, None, noise)


def _in_training_mode(
    setup: Setup, state: TrainState, images: Array, labels: Array, keys: Array, noise: Any
) -> tuple[TrainState, Array]:
    """As published: the state's running averages are moved by every pass of the attack."""

    def function(x: Array, stats: Tree, number: int | Array) -> tuple[ExitLogits, Tree]:
        output, stats = setup.network.apply(
            state.params,
            stats,
            x,
            train=True,
            noise=added(noise),
            axis_name=setup.axis_name,
            keys=fold(fold(keys, _PASSES), number),
        )
        return exits_of(output), stats

    adversarial, stats = setup.attack(
        function, images, labels, keys, state.stats, setup.network.num_exits
    )
    return state._replace(stats=stats), adversarial


MAKERS = {"inference": _in_inference_mode, "train": _in_training_mode}


def _attack(words: AttackSettings, settings: Settings) -> Any:
    aim = settings.exits.defence
    aim = "main" if aim == "none" else aim
    pgd(**words._asdict())  # what cannot be is refused here, not where a step is traced
    if settings.exits.attack_mode == "train":
        return InTraining(aim, *words)
    return on_exits(aim, lambda loss: pgd(**words._asdict(), loss=loss))


def _check(network: Network, settings: Settings) -> None:
    exits, count = settings.exits, network.num_exits
    number = side_exit(exits.defence)
    if exits.defence not in AIMS and not number:
        raise UserError(
            f"exits.defence={exits.defence!r} is unknown; choose one of {', '.join(AIMS)}"
        )
    if number >= count:
        raise UserError(f"exits.defence={exits.defence!r}: the network has {count - 1} side exits")
    if exits.objective not in OBJECTIVES:
        raise UserError(
            f"exits.objective={exits.objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}"
        )
    if exits.weights and len(exits.weights) != count:
        raise UserError(
            f"exits.weights={tuple(exits.weights)} must be one weight for each of the network's "
            f"{count} exits, the main one last; or empty"
        )
    if any(weight < 0 for weight in exits.weights):
        raise UserError(f"exits.weights={tuple(exits.weights)} must not be negative")
    if exits.attack_mode not in MODES:
        raise UserError(
            f"attack.mode={exits.attack_mode!r} is unknown; choose one of {', '.join(MODES)}"
        )


def _selected_by(settings: Settings) -> str:
    is_attacked = settings.exits.defence != "none"
    return "robust_accuracy" if is_attacked else "standard_accuracy"


MULTI_EXIT = Method(
    "half clean, half attacked images, the losses of all exits summed (Hu et al., ICLR 2020)",
    _multi_exit,
    attack_loss="cross_entropy",
    selected_by=_selected_by,
    check=_check,
    own_attack=_attack,
)
