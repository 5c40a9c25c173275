"""Methods for any network: standard training, adversarial training, TRADES."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import Output
from advmoe_jax.training.methods.step import (
    Loss,
    Method,
    Settings,
    Setup,
    Step,
    accuracy,
    added,
    answers_of,
)
from advmoe_jax.training.state import TrainState
from advmoe_jax.types import Array, Tree


def _standard(setup: Setup) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        batch = (images, labels, setup.noise(state, keys), setup.dropout(keys))
        new, loss, output = setup.descend(
            state, _cross_entropy_loss(setup), setup.network.parts, batch
        )
        metrics = {"loss": loss, "standard_accuracy": accuracy(output.logits, labels)}
        return setup.finish(new, metrics | setup.routing_metrics(output.routing))

    return step


def _cross_entropy_loss(setup: Setup) -> Loss:
    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, labels, noise, dropped = batch
        passes = {"noise": added(noise), "keys": dropped, "axis_name": setup.axis_name}
        output, stats = setup.network.apply(params, stats, images, train=True, **passes)
        loss = setup.classification(output.answers, labels)
        return setup.balanced(loss, output.routing, noise), (stats, output)

    return loss_fn


def _adversarial(setup: Setup) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = setup.noise(state, keys)
        clean = setup.infer(state, images, noise)
        adversarial = setup.attack(
            lambda x, noise: setup.infer(state, x, noise).answers, images, labels, keys, None, noise
        )
        batch = (adversarial, labels, noise, setup.dropout(keys))
        new, loss, output = setup.descend(
            state, _cross_entropy_loss(setup), setup.network.parts, batch
        )
        metrics = {
            "loss": loss,
            "standard_accuracy": accuracy(clean.logits, labels),
            "robust_accuracy": accuracy(output.logits, labels),
        }
        return setup.finish(new, metrics | setup.routing_metrics(clean.routing, output.routing))

    return step


def trades(
    setup: Setup,
    outputs_of: Callable[[Output], Any],
    parts: Sequence[str] | None = None,
    surrogate: bool | None = None,
) -> Step:
    """TRADES' step: CE(f(x), y) + beta KL(f(x) || f(x')).

    Args:
        setup: what every step is made of.
        outputs_of: what the attack that makes x' looks at.
        parts: names of those that are trained; None: all.
        surrogate: see ``Network.apply``.
    """

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = setup.noise(state, keys)
        clean = setup.infer(state, images, noise)
        adversarial = setup.diverge(state, images, clean, keys, noise, outputs_of)

        def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
            images, adversarial, labels, noise, dropped = batch
            passes = {"train": True, "surrogate": surrogate, "axis_name": setup.axis_name}
            passes |= {"noise": added(noise), "keys": dropped}  # the same for both images
            natural, stats = setup.network.apply(params, stats, images, **passes)
            attacked, stats = setup.network.apply(params, stats, adversarial, **passes)
            loss = setup.trades_loss(natural.answers, attacked.answers, labels)
            loss = setup.balanced(loss, natural.routing, noise)
            return loss, (stats, (natural, attacked))

        batch = (images, adversarial, labels, noise, setup.dropout(keys))
        new, loss, (natural, attacked) = setup.descend(
            state, loss_fn, parts or setup.network.parts, batch
        )
        metrics = {
            "loss": loss,
            "standard_accuracy": accuracy(natural.logits, labels),
            "robust_accuracy": accuracy(attacked.logits, labels),
        }
        return setup.finish(new, metrics | setup.routing_metrics(natural.routing, attacked.routing))

    return step


def _has_no_adversary(network: Network, settings: Settings) -> None:
    if settings.awp:
        raise UserError(
            "loss.awp perturbs the weights of adversarial training; method='standard' has none: "
            "set loss.awp=0, or choose method 'at' or 'trades'"
        )


STANDARD = Method(
    "cross-entropy on clean images",
    _standard,
    attack_loss="cross_entropy",
    # There is no robust accuracy worth choosing by.
    selected_by=lambda settings: "standard_accuracy",
    check=_has_no_adversary,
)
AT = Method(
    "cross-entropy on PGD images (Madry et al., 2018)", _adversarial, attack_loss="cross_entropy"
)
TRADES = Method(
    "CE(f(x), y) + beta KL(f(x) || f(x')), x' from the KL attack (Zhang et al., 2019)",
    partial(trades, outputs_of=answers_of),
)
