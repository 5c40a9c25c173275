"""Methods for a mixture: joint training, and AdvMoE (Zhang et al., ICCV 2023)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import cross_entropy, kl
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import Output
from advmoe_jax.routing.choice import Routing
from advmoe_jax.training.balance import Noise
from advmoe_jax.training.methods.adversarial import trades
from advmoe_jax.training.methods.step import (
    Loss,
    Method,
    Settings,
    Setup,
    Step,
    accuracy,
    added,
    fold,
    joint_outputs,
)
from advmoe_jax.training.state import TrainState
from advmoe_jax.types import Array, Tree


def _advmoe(setup: Setup) -> Step:
    """One alternation. The half that is not trained is fixed: inference mode, frozen statistics.

    So the clean routes of the experts' update are those the attack saw, and ``r(x)`` is computed
    once for both attacks, since the router does not move in between.
    """
    network, settings = setup.network, setup.settings
    train_router = ROUTER_OBJECTIVES[settings.router_objective](setup)

    def experts_loss(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        (*natural_batch, labels), attacked_batch, dropped = batch
        passes = {"train": True, "keys": dropped, "axis_name": setup.axis_name}

        def follow(stats: Tree, images: Array, routing: Routing | None) -> tuple[Array, Tree]:
            output, stats = network.apply(params, stats, images, routing=routing, **passes)
            return output.answers, stats

        natural, stats = follow(stats, *natural_batch)
        attacked, stats = follow(stats, *attacked_batch)
        return setup.trades_loss(natural, attacked, labels), (stats, attacked)

    def train_experts(
        state: TrainState, images: Array, labels: Array, keys: Array, clean: Output, noise: Any
    ) -> tuple[TrainState, Array, Output]:
        """The state, the loss, and what the network said of the attacked images."""
        adversarial = _joint_attack(setup, state, images, clean, keys, noise)
        routing = network.route(state.params, state.stats, adversarial, noise=added(noise))[0]
        clean_batch, dropped = (images, clean.routing, labels), setup.dropout(keys)
        batch = (clean_batch, (adversarial, routing), dropped)
        experts = [part for part in network.parts if part != "router"]  # and their exits
        state, loss, attacked = setup.descend(state, experts_loss, experts, batch)
        return state, loss, Output(attacked, routing)

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = setup.noise(state, keys)
        clean = setup.infer(state, images, noise)
        now, losses = clean, {}
        if settings.frozen != "experts":
            state, losses["loss"], attacked = train_experts(
                state, images, labels, fold(keys, 0), clean, noise
            )
            moved = network.apply(state.params, state.stats, images, routing=clean.routing)[0]
            now = moved._replace(routing=clean.routing)
        if settings.frozen != "router":
            adversarial = _joint_attack(setup, state, images, now, fold(keys, 1), noise)
            if settings.frozen:
                attacked = setup.infer(state, adversarial, noise)
            batch = (images, adversarial, labels, noise)
            state, losses["router_loss"], _ = setup.descend(state, train_router, ["router"], batch)
        metrics = {
            "loss": losses.get("loss", losses.get("router_loss")),
            **losses,
            "standard_accuracy": accuracy(clean.logits, labels),
            "robust_accuracy": accuracy(attacked.logits, labels),
        }
        return setup.finish(state, metrics | setup.routing_metrics(clean.routing, attacked.routing))

    return step


def _pathway_loss(setup: Setup) -> Loss:
    """TRADES' loss as the fixed experts see it through the gate."""

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, noise = batch
        passes = {"train_router": True, "noise": added(noise), "axis_name": setup.axis_name}
        natural, stats = setup.network.apply(params, stats, images, **passes)
        attacked, stats = setup.network.apply(params, stats, adversarial, **passes)
        loss = setup.trades_loss(natural.answers, attacked.answers, labels)
        return setup.balanced(loss, natural.routing, noise), (stats, None)

    return loss_fn


def _assignment_loss(setup: Setup) -> Loss:
    """alpha CE(r(x), y mod N) + beta KL(r(x) || r(x')): class y belongs to expert y mod N."""

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, noise = batch
        experts = expert_targets(labels, setup.network.num_experts)
        passes = {"train": True, "noise": added(noise), "axis_name": setup.axis_name}
        natural, stats = setup.network.route(params, stats, images, **passes)
        attacked, stats = setup.network.route(params, stats, adversarial, **passes)
        assigned = setup.settings.alpha * jnp.mean(cross_entropy(natural.scores, experts))
        smooth = setup.settings.beta * jnp.mean(kl(attacked.scores, natural.scores))
        return setup.balanced(assigned + smooth, natural, noise), (stats, None)

    return loss_fn


def expert_targets(labels: Array, num_experts: int) -> Array:
    """y mod N; of distributions over the classes, the distribution over the experts."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return labels % num_experts
    return labels @ jax.nn.one_hot(jnp.arange(labels.shape[-1]) % num_experts, num_experts)


def _joint_attack(
    setup: Setup,
    state: TrainState,
    images: Array,
    clean: Output,
    keys: Array,
    noise: Noise | None,
) -> Array:
    """Maximises KL(f(x) || f(x')) + KL(r(x) || r(x'))."""
    return setup.attack(
        lambda x, noise: joint_outputs(setup.infer(state, x, noise)),
        *(images, None, keys, joint_outputs(clean), noise),
    )


# By name: the paper's, and the published code's.
ROUTER_OBJECTIVES = {"pathway": _pathway_loss, "assignment": _assignment_loss}


def _has_router(method: str, network: Network, settings: Settings) -> None:
    if not network.is_moe:
        raise UserError(
            f"method={method!r} trains a router, but model.num_experts=1 has none; "
            "set model.num_experts=2 or more, or choose method 'at' or 'trades'"
        )
    if settings.router_objective not in ROUTER_OBJECTIVES:
        raise UserError(
            f"loss.router_objective={settings.router_objective!r} is unknown; "
            f"choose one of {', '.join(ROUTER_OBJECTIVES)}"
        )


JOINT = Method(
    "TRADES' loss for router and experts in one optimizer step, x' from the joint attack",
    partial(trades, outputs_of=joint_outputs),
    check=partial(_has_router, "joint"),
)
ADVMOE = Method(
    "experts and router in turn, each against its own fresh joint attack (Zhang et al., ICCV "
    "2023, eq. 4 and algorithm 1)",
    _advmoe,
    check=partial(_has_router, "advmoe"),
)
