"""Methods for a mixture: joint training, and AdvMoE (Zhang et al., ICCV 2023)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks import box, cross_entropy, kl
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import Output
from advmoe_jax.routing.choice import Routing
from advmoe_jax.training.methods.adversarial import trades
from advmoe_jax.training.methods.step import (
    Loss,
    Method,
    Settings,
    Setup,
    Step,
    accuracy,
    added,
    answers_of,
    fold,
    joint_outputs,
)
from advmoe_jax.training.state import TrainState
from advmoe_jax.types import Array, Axes, Tree


def _advmoe(setup: Setup) -> Step:
    """One alternation. The half that is not trained is fixed: inference mode, frozen statistics.

    So the clean routes of the experts' update are those the attack saw. ``r(x)`` is computed once
    for both attacks where it is of the image alone: the router does not move in between. Routers of
    single layers see features, which do.
    """
    network, settings = setup.network, setup.settings
    objective = ROUTER_OBJECTIVES[settings.router_objective]
    train_router = objective.loss(setup)
    on_experts = ATTACKED["joint" if objective.is_attacked else "answers"]
    on_router = ATTACKED[settings.router_attack]

    def experts_loss(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        (*natural_batch, labels), attacked_batch, elsewhere, dropped = batch
        passes = {"train": True, "keys": dropped, "axis_name": setup.axis_name}

        def follow(stats: Tree, images: Array, routing: Routing | None) -> tuple[Array, Tree]:
            output, stats = network.apply(params, stats, images, routing=routing, **passes)
            return output.answers, stats

        natural, stats = follow(stats, *natural_batch)
        attacked, stats = follow(stats, *attacked_batch)
        loss = setup.trades_loss(natural, attacked, labels)
        if elsewhere is not None:
            there, stats = follow(stats, attacked_batch[0], elsewhere)
            loss += settings.consistency * jnp.mean(kl(there, natural))
        return loss, (stats, attacked)

    def train_experts(
        state: TrainState, images: Array, labels: Array, keys: Array, clean: Output, noise: Any
    ) -> tuple[TrainState, Array, Output]:
        """The state, the loss, and what the network said of the attacked images."""
        adversarial = setup.diverge(state, images, clean, keys, noise, on_experts)
        routing = network.route(state.params, state.stats, adversarial, noise=added(noise))[0]
        elsewhere = _another(routing, fold(keys, 4)) if settings.consistency else None
        clean_batch, dropped = (images, clean.routing, labels), setup.dropout(keys)
        batch = (clean_batch, (adversarial, routing), elsewhere, dropped)
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
            if network.has_route_bounds:  # one router, of the image
                moved = network.apply(state.params, state.stats, images, routing=clean.routing)[0]
                now = moved._replace(routing=clean.routing)
            else:
                now = setup.infer(state, images, noise)
        if settings.frozen != "router":
            adversarial = images
            if objective.is_attacked or settings.frozen:
                adversarial = setup.diverge(state, images, now, fold(keys, 1), noise, on_router)
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
    """alpha CE(r(x), e(y)) + beta KL(r(x) || r(x')), e(y) the expert of class y."""

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, noise = batch
        num_experts, of_class = setup.network.num_experts, setup.settings.class_experts
        experts = expert_targets(labels, num_experts, of_class)
        passes = {"train": True, "noise": added(noise), "axis_name": setup.axis_name}
        natural, stats = setup.network.route(params, stats, images, **passes)
        attacked, stats = setup.network.route(params, stats, adversarial, **passes)
        assigned = setup.settings.alpha * jnp.mean(cross_entropy(natural.scores, experts))
        smooth = setup.settings.beta * jnp.mean(kl(attacked.scores, natural.scores))
        return setup.balanced(assigned + smooth, natural, noise), (stats, None)

    return loss_fn


def _certified_loss(setup: Setup) -> Loss:
    """Cross-entropy of the worst scores in the ball; an image's label is where it stands out most.

    No attack is needed: the worst scores are bounds (``models.route_bounds``), as in training by
    interval bounds (Gowal et al., 2018, arXiv 1810.12715, section 4). The labels of the images play
    no part: the router finds a division of the images that the attacker cannot cross. An image is
    to go to the expert whose score is largest beside that expert's other scores, in units of their
    deviation over the batch: so every expert is the aim of some, and none is starved.
    """

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, _, _, noise = batch
        passes = {"train": True, "noise": added(noise), "axis_name": setup.axis_name}
        natural, stats = setup.network.route(params, stats, images, **passes)
        preferred = jnp.argmax(_standardised(natural.scores[:, 0], setup.axis_name), axis=-1)
        low_and_high = box(setup.settings.threat, images)
        margins = setup.network.route_margins(params, stats, *low_and_high)
        worst = -jnp.take_along_axis(margins, preferred[:, None, None], axis=1)[:, 0]
        loss = jnp.mean(cross_entropy(worst, preferred))
        return setup.balanced(loss, natural, noise), (stats, None)

    return loss_fn


def _standardised(scores: Array, axis_name: Axes | None) -> Array:
    """Scores [B, N] of mean 0 and variance 1 over the batch of all devices; no gradient."""

    def mean(x: Array) -> Array:
        of_device = jnp.mean(x, axis=0)
        return of_device if axis_name is None else lax.pmean(of_device, axis_name)

    apart = lax.stop_gradient(scores) - mean(lax.stop_gradient(scores))
    return apart * lax.rsqrt(mean(jnp.square(apart)) + jnp.finfo(jnp.float32).tiny)


def expert_targets(labels: Array, num_experts: int, of_class: tuple[int, ...] = ()) -> Array:
    """The experts of labels; of distributions over the classes, distributions over the experts.

    Args:
        labels: int [B], or float [B, K].
        num_experts: N.
        of_class: the expert of each of K classes; empty: y mod N, as published.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.asarray(of_class)[labels] if of_class else labels % num_experts
    experts = jnp.asarray(of_class or [y % num_experts for y in range(labels.shape[-1])])
    return labels @ jax.nn.one_hot(experts, num_experts)


def _another(routing: Routing, keys: Array) -> Routing:
    """Other experts than these for every image, drawn at random, with the same weights."""
    num_experts = routing.scores.shape[-1]
    shift = jax.vmap(lambda key: jax.random.randint(key, (), 1, num_experts))(keys)
    return routing._replace(indices=(routing.indices + shift[:, None, None]) % num_experts)


class Objective(NamedTuple):
    """What the router's update descends.

    Attributes:
        loss: makes it.
        is_attacked: whether it looks at attacked images. If not, the experts' attack leaves the
            scores alone, too: where the route cannot be moved, a step up their divergence is lost
            on the classifier.
    """

    loss: Callable[[Setup], Loss]
    is_attacked: bool = True


def _scores_of(output: Output) -> Array:
    """What an attack on the router alone looks at."""
    return output.routing.scores


# What the router's update is attacked by, by name: both divergences, as published, or one alone.
ATTACKED: dict[str, Callable[[Output], Any]] = {
    "joint": joint_outputs,
    "answers": answers_of,
    "scores": _scores_of,
}

# By name: the paper's, the published code's, and one of ours, whose routes can be certified.
ROUTER_OBJECTIVES = {
    "pathway": Objective(_pathway_loss),
    "assignment": Objective(_assignment_loss),
    "certified": Objective(_certified_loss, is_attacked=False),
}


def _has_router(method: str, network: Network, settings: Settings) -> None:
    if not network.is_moe:
        raise UserError(
            f"method={method!r} trains a router, but model.num_experts=1 has none; "
            "set model.num_experts=2 or more, or choose method 'at' or 'trades'"
        )
    if method == "advmoe" and network.capacity.training:
        raise UserError(
            f"model.capacity.training={network.capacity.training} drops choices where a batch is "
            "routed, but method='advmoe' trains experts along routes that are given: set it to 0, "
            "or choose method 'joint'"
        )
    if settings.router_objective not in ROUTER_OBJECTIVES:
        raise UserError(
            f"loss.router_objective={settings.router_objective!r} is unknown; "
            f"choose one of {', '.join(ROUTER_OBJECTIVES)}"
        )
    if settings.router_attack not in ATTACKED:
        raise UserError(
            f"loss.router_attack={settings.router_attack!r} is unknown; "
            f"choose one of {', '.join(ATTACKED)}"
        )
    if settings.router_objective == "certified":
        _can_be_certified(network)
    if settings.class_experts and settings.router_objective != "assignment":
        raise UserError(
            "loss.class_experts says which class goes where, which only "
            f"router_objective='assignment' asks, not {settings.router_objective!r}: leave it empty"
        )
    for expert in settings.class_experts:
        if type(expert) is not int or expert not in range(network.num_experts):
            raise UserError(
                f"loss.class_experts={settings.class_experts} names expert {expert!r}; there are "
                f"0 to {network.num_experts - 1}"
            )


def _can_be_certified(network: Network) -> None:
    if not network.has_route_bounds:
        raise UserError(
            "loss.router_objective='certified' is for one router that sees the image: set "
            "model.router.scope='global', or choose another objective"
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
