"""Training methods: pure steps from (state, batch) to (state, metrics). They know no loop.

Every step has the signature of ``Step`` and works on one device's part of the batch: gradients,
metrics and BatchNorm statistics are averaged over ``axis_name`` if one is given, so the same step
runs alone, under ``shard_map`` and under ``pmap``. Attacks see the network in inference mode.

=============  ===================================================================================
``standard``   cross-entropy on clean images
``at``         cross-entropy on PGD images (Madry et al., 2018)
``trades``     CE(f(x), y) + beta KL(f(x) || f(x')), x' from the KL attack (Zhang et al., 2019)
``joint``      TRADES' loss for router and experts in one optimizer step, x' from the joint attack
``advmoe``     experts and router in turn, each against its own fresh joint attack (Zhang et al.,
               ICCV 2023, eq. 4 and algorithm 1)
=============  ===================================================================================
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks import Attack, cross_entropy, kl
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network, Output
from advmoe_jax.models.router import Routing
from advmoe_jax.training.state import Optimizers, TrainState, update

Array = jax.Array
Tree = dict[str, Any]

METHODS = ("standard", "at", "trades", "joint", "advmoe")
ROUTER_OBJECTIVES = ("pathway", "assignment")


class Step(Protocol):
    """(state, images float32 [B, H, W, C], labels int [B], keys [B]) -> (state, metrics).

    ``metrics`` are float32 means over the batch: ``loss``, ``standard_accuracy``,
    ``robust_accuracy`` (on the step's own adversarial images; absent in ``standard``),
    ``router_loss`` (``advmoe``) and, for an MoE, ``routing`` (see ``routing_metrics``).
    """

    def __call__(
        self, state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        """One step on this device's part of the batch."""


class Settings(NamedTuple):
    """What the losses weigh.

    Attributes:
        beta: weight of the KL terms.
        alpha: weight of the router's cross-entropy under the ``assignment`` objective.
        router_objective: ``pathway``: TRADES' loss seen through the gate (the paper's);
            ``assignment``: alpha CE(r(x), y mod N) + beta KL(r(x) || r(x')) (the published code's).
    """

    beta: float = 6.0
    alpha: float = 6.0
    router_objective: str = "pathway"


def create_step(
    method: str,
    network: Network,
    optimizers: Optimizers,
    attack: Attack,
    settings: Settings,
    axis_name: str | None = None,
) -> Step:
    """The step of a method.

    Args:
        method: one of ``METHODS``.
        network: functional form of the model.
        optimizers: of both subtrees.
        attack: the training attack; its loss must be the method's (see ``training_attack_loss``).
        settings: weights of the losses.
        axis_name: mapped axis over which the batch is spread, if any.

    Raises:
        UserError: if the method or the router objective is unknown, or the method needs a router
            that the network does not have.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if settings.router_objective not in ROUTER_OBJECTIVES:
        raise UserError(
            f"loss.router_objective={settings.router_objective!r} is unknown; "
            f"choose one of {', '.join(ROUTER_OBJECTIVES)}"
        )
    if method in ("joint", "advmoe") and not network.is_moe:
        raise UserError(
            f"method={method!r} trains a router, but model.num_experts=1 has none; "
            "set model.num_experts=2 or more, or choose method 'at' or 'trades'"
        )
    parts = _Parts(network, optimizers, attack, settings, axis_name)
    build = {
        "standard": _standard,
        "at": _adversarial,
        "trades": partial(_trades, outputs_of=_logits),
        "joint": partial(_trades, outputs_of=_joint_outputs),
        "advmoe": _advmoe,
    }[method]
    return build(parts)


def training_attack_loss(method: str) -> str:
    """The loss that a method's training attack maximises."""
    return "cross_entropy" if method in ("standard", "at") else "kl"


class _Parts(NamedTuple):
    """What every step is made of, and the two things that all of them do."""

    network: Network
    optimizers: Optimizers
    attack: Attack
    settings: Settings
    axis_name: str | None

    def infer(self, state: TrainState, images: Array) -> Output:
        """One pass in inference mode."""
        return self.network.apply(state.params, state.stats, images)[0]

    def descend(
        self, state: TrainState, loss_fn: Callable[[Tree], tuple[Array, Any]], branches: list[str]
    ) -> tuple[TrainState, Array, Any]:
        """Moves ``branches`` of the parameters down the gradient of ``loss_fn(params)``.

        ``loss_fn`` returns (loss, (stats, auxiliary)); the new statistics enter the state.
        """

        def of_branches(moving: Tree) -> tuple[Array, Any]:
            return loss_fn(state.params | moving)

        moving = {name: state.params[name] for name in branches}
        (loss, (stats, aux)), grads = jax.value_and_grad(of_branches, has_aux=True)(moving)
        grads = self.mean(grads)
        return update(state._replace(stats=stats), grads, self.optimizers), loss, aux

    def mean(self, tree: Any) -> Any:
        """Averages every array over the devices."""
        return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)


def _standard(parts: _Parts) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        del keys

        def loss_fn(params: Tree) -> tuple[Array, Any]:
            output, stats = parts.network.apply(
                params, state.stats, images, train=True, axis_name=parts.axis_name
            )
            return jnp.mean(cross_entropy(output.logits, labels)), (stats, output)

        new, loss, output = parts.descend(state, loss_fn, ["router", "experts"])
        metrics = {"loss": loss, "standard_accuracy": _accuracy(output.logits, labels)}
        return _finish(parts, new, metrics | routing_metrics(output.routing))

    return step


def _adversarial(parts: _Parts) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        clean = parts.infer(state, images)
        adversarial = parts.attack(lambda x: parts.infer(state, x).logits, images, labels, keys)

        def loss_fn(params: Tree) -> tuple[Array, Any]:
            output, stats = parts.network.apply(
                params, state.stats, adversarial, train=True, axis_name=parts.axis_name
            )
            return jnp.mean(cross_entropy(output.logits, labels)), (stats, output)

        new, loss, output = parts.descend(state, loss_fn, ["router", "experts"])
        metrics = {
            "loss": loss,
            "standard_accuracy": _accuracy(clean.logits, labels),
            "robust_accuracy": _accuracy(output.logits, labels),
        }
        return _finish(parts, new, metrics | routing_metrics(clean.routing, output.routing))

    return step


def _trades(parts: _Parts, outputs_of: Callable[[Output], Any]) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        clean = parts.infer(state, images)
        adversarial = parts.attack(
            lambda x: outputs_of(parts.infer(state, x)), images, None, keys, outputs_of(clean)
        )

        def loss_fn(params: Tree) -> tuple[Array, Any]:
            passes = {"train": True, "axis_name": parts.axis_name}
            natural, stats = parts.network.apply(params, state.stats, images, **passes)
            attacked, stats = parts.network.apply(params, stats, adversarial, **passes)
            loss = _trades_loss(natural.logits, attacked.logits, labels, parts.settings.beta)
            return loss, (stats, (natural, attacked))

        new, loss, (natural, attacked) = parts.descend(state, loss_fn, ["router", "experts"])
        metrics = {
            "loss": loss,
            "standard_accuracy": _accuracy(natural.logits, labels),
            "robust_accuracy": _accuracy(attacked.logits, labels),
        }
        return _finish(parts, new, metrics | routing_metrics(natural.routing, attacked.routing))

    return step


def _advmoe(parts: _Parts) -> Step:
    """One alternation. The half that is not trained is fixed: inference mode, frozen statistics.

    So the clean routes of the experts' update are those the attack saw, and ``r(x)`` is computed
    once for both attacks, since the router does not move in between.
    """
    network, settings = parts.network, parts.settings
    train_router = {"pathway": _pathway_loss, "assignment": _assignment_loss}[
        settings.router_objective
    ]

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        clean = parts.infer(state, images)
        adversarial = _joint_attack(parts, state, images, clean, _fold(keys, 0))
        attacked_routing = network.route(state.params, state.stats, adversarial)[0]

        def experts_loss(params: Tree) -> tuple[Array, Any]:
            def follow(stats: Tree, images: Array, routing: Routing | None) -> tuple[Array, Tree]:
                output, stats = network.apply(
                    params, stats, images, train=True, routing=routing, axis_name=parts.axis_name
                )
                return output.logits, stats

            natural, stats = follow(state.stats, images, clean.routing)
            attacked, stats = follow(stats, adversarial, attacked_routing)
            loss = _trades_loss(natural, attacked, labels, settings.beta)
            return loss, (stats, attacked)

        state, loss, attacked = parts.descend(state, experts_loss, ["experts"])

        logits = network.apply(state.params, state.stats, images, routing=clean.routing)[0].logits
        adversarial = _joint_attack(
            parts, state, images, Output(logits, clean.routing), _fold(keys, 1)
        )
        state, router_loss, _ = parts.descend(
            state, train_router(parts, state, images, adversarial, labels), ["router"]
        )
        metrics = {
            "loss": loss,
            "router_loss": router_loss,
            "standard_accuracy": _accuracy(clean.logits, labels),
            "robust_accuracy": _accuracy(attacked, labels),
        }
        return _finish(parts, state, metrics | routing_metrics(clean.routing, attacked_routing))

    return step


RouterLoss = Callable[[Tree], tuple[Array, Any]]


def _pathway_loss(
    parts: _Parts, state: TrainState, images: Array, adversarial: Array, labels: Array
) -> RouterLoss:
    """TRADES' loss as the fixed experts see it through the gate."""

    def loss_fn(params: Tree) -> tuple[Array, Any]:
        def through_gate(stats: Tree, images: Array) -> tuple[Array, Tree]:
            output, stats = parts.network.apply(
                params, stats, images, train_router=True, axis_name=parts.axis_name
            )
            return output.logits, stats

        natural, stats = through_gate(state.stats, images)
        attacked, stats = through_gate(stats, adversarial)
        return _trades_loss(natural, attacked, labels, parts.settings.beta), (stats, None)

    return loss_fn


def _assignment_loss(
    parts: _Parts, state: TrainState, images: Array, adversarial: Array, labels: Array
) -> RouterLoss:
    """alpha CE(r(x), y mod N) + beta KL(r(x) || r(x')): class y belongs to expert y mod N."""
    experts = labels % parts.network.num_experts

    def loss_fn(params: Tree) -> tuple[Array, Any]:
        passes = {"train": True, "axis_name": parts.axis_name}
        natural, stats = parts.network.route(params, state.stats, images, **passes)
        attacked, stats = parts.network.route(params, stats, adversarial, **passes)
        assigned = parts.settings.alpha * jnp.mean(cross_entropy(natural.scores, experts))
        smooth = parts.settings.beta * jnp.mean(kl(attacked.scores, natural.scores))
        return assigned + smooth, (stats, None)

    return loss_fn


def _joint_attack(
    parts: _Parts, state: TrainState, images: Array, clean: Output, keys: Array
) -> Array:
    """Maximises KL(f(x) || f(x')) + KL(r(x) || r(x'))."""
    return parts.attack(
        lambda x: _joint_outputs(parts.infer(state, x)), images, None, keys, _joint_outputs(clean)
    )


def _logits(output: Output) -> Array:
    return output.logits


def _joint_outputs(output: Output) -> tuple[Array, Array]:
    return output.logits, output.routing.scores


def _trades_loss(natural: Array, attacked: Array, labels: Array, beta: float) -> Array:
    return jnp.mean(cross_entropy(natural, labels)) + beta * jnp.mean(kl(attacked, natural))


def _accuracy(logits: Array, labels: Array) -> Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def routing_metrics(clean: Routing | None, attacked: Routing | None = None) -> Tree:
    """{"routing": ...} of a batch, or {} for a dense network.

    ``load`` float32 [N]: share of the choices that fall on each expert; ``entropy``: mean entropy
    of softmax(scores), in nats; ``agreement``: share of images whose first choice survives the
    attack (if ``attacked`` is given). Routers per layer: means over the layers, and ``layers``
    holds ``load`` [L, N], ``entropy`` [L] and ``agreement`` [L].
    """
    if clean is None:
        return {}
    log_probs = jax.nn.log_softmax(clean.scores)
    layers = {
        "load": jnp.mean(jax.nn.one_hot(clean.indices, clean.scores.shape[-1]), axis=(0, -2)),
        "entropy": -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1), axis=0),
    }
    if attacked is not None:
        same = clean.indices[..., 0] == attacked.indices[..., 0]
        layers["agreement"] = jnp.mean(same, axis=0)
    if clean.scores.ndim == 2:
        return {"routing": layers}
    means = {name: jnp.mean(value, axis=0) for name, value in layers.items()}
    return {"routing": {**means, "layers": layers}}


def _finish(parts: _Parts, state: TrainState, metrics: Tree) -> tuple[TrainState, Tree]:
    metrics = jax.tree.map(lambda x: lax.stop_gradient(x).astype(jnp.float32), metrics)
    return state._replace(step=state.step + 1), parts.mean(metrics)


def _fold(keys: Array, data: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
