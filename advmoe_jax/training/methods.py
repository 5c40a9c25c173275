"""Training methods: pure steps from (state, batch) to (state, metrics). They know no loop.

Every step has the signature of ``Step`` and works on one device's part of the batch: gradients,
metrics and BatchNorm statistics are averaged over ``axis_name`` if one is given, so the same step
runs alone, under ``shard_map`` and under ``pmap``. Attacks see the network in inference mode.

=============  ===================================================================================
``standard``   cross-entropy on clean images
``at``         cross-entropy on PGD images (Madry et al., 2018)
``trades``     CE(f(x), y) + beta KL(f(x) || f(x')), x' from the KL attack (Zhang et al., 2019)
``hydra``      TRADES' loss for a Sparse network: its channel scores first, its kernels frozen;
               then its kernels, the channels chosen (Sehwag et al., NeurIPS 2020)
``joint``      TRADES' loss for router and experts in one optimizer step, x' from the joint attack
``advmoe``     experts and router in turn, each against its own fresh joint attack (Zhang et al.,
               ICCV 2023, eq. 4 and algorithm 1)
=============  ===================================================================================
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks import Attack, cross_entropy, kl
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network, Output
from advmoe_jax.routing.choice import Routing
from advmoe_jax.training import awp, balance
from advmoe_jax.training.balance import Balance, Noise
from advmoe_jax.training.state import Optimizers, TrainState, update, update_average

Array = jax.Array
Tree = dict[str, Any]

Loss = Callable[[Tree, Tree, Any], tuple[Array, Any]]  # see _Parts.descend

METHODS = ("standard", "at", "trades", "hydra", "joint", "advmoe")
ROUTER_OBJECTIVES = ("pathway", "assignment")


class Step(Protocol):
    """(state, images float32 [B, H, W, C], labels int [B], keys [B]) -> (state, metrics).

    Labels may be distributions over the classes, float32 [B, K] (see ``Mixture.cutmix``).
    ``metrics`` are float32 means over the batch: ``loss``, ``standard_accuracy``,
    ``robust_accuracy`` (on the step's own adversarial images; absent in ``standard``),
    ``router_loss`` (``advmoe``, unless the router is frozen; it is the ``loss`` if the experts
    are) and, for an MoE, ``routing`` (see ``routing_metrics``).
    """

    def __call__(
        self, state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        """One step on this device's part of the batch."""


class Settings(NamedTuple):
    """What the losses weigh, and what is done besides descending them.

    Attributes:
        beta: weight of the KL terms.
        alpha: weight of the router's cross-entropy under the ``assignment`` objective.
        pruning_steps: steps in which ``hydra`` learns scores, before those that train kernels.
        router_objective: ``pathway``: TRADES' loss seen through the gate (the paper's);
            ``assignment``: alpha CE(r(x), y mod N) + beta KL(r(x) || r(x')) (the published code's).
        label_smoothing: share of the cross-entropy's target that is spread over all classes
            (Szegedy et al., CVPR 2016, section 7).
        awp: relative size of the adversarial perturbation of the experts' weights, under which
            their gradient is taken (see ``awp.perturbation``); 0: none.
        awp_warmup_steps: steps before the first such perturbation.
        ema_decay: of the average of the weights, see ``state.update_average``; 0: none is kept.
        balance: what keeps the router from collapsing.
        frozen: ``router`` or ``experts``: that half keeps its parameters and statistics; empty:
            both are trained.
    """

    beta: float = 6.0
    alpha: float = 6.0
    router_objective: str = "pathway"
    pruning_steps: int = 0
    label_smoothing: float = 0.0
    awp: float = 0.0
    awp_warmup_steps: int = 0
    ema_decay: float = 0.0
    balance: Balance = Balance()
    frozen: str = ""


def create_step(
    method: str,
    network: Network,
    optimizers: Optimizers,
    attack: Attack,
    settings: Settings,
    axis_name: str | None = None,
    microbatches: int = 1,
) -> Step:
    """The step of a method.

    Args:
        method: one of ``METHODS``.
        network: functional form of the model.
        optimizers: of both subtrees.
        attack: the training attack; its loss must be the method's (see ``training_attack_loss``).
        settings: weights of the losses.
        axis_name: mapped axis over which the batch is spread, if any.
        microbatches: into how many parts a device's batch is cut to save memory. Gradients are
            those of the whole batch, up to rounding and to what BatchNorm makes of it: every part
            is normalised with its own statistics, and moves the running ones. Balancing losses
            are means over the parts.

    Raises:
        UserError: if the method or the router objective is unknown, the method needs a router
            that the network does not have, or settings do not go together.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    if settings.router_objective not in ROUTER_OBJECTIVES:
        raise UserError(
            f"loss.router_objective={settings.router_objective!r} is unknown; "
            f"choose one of {', '.join(ROUTER_OBJECTIVES)}"
        )
    if settings.frozen and (settings.frozen not in ("router", "experts") or method != "advmoe"):
        raise UserError(
            f"start.frozen={settings.frozen!r} must be 'router', 'experts' or empty, and needs "
            f"method='advmoe', which trains one half at a time, not {method!r}"
        )
    if method in ("joint", "advmoe") and not network.is_moe:
        raise UserError(
            f"method={method!r} trains a router, but model.num_experts=1 has none; "
            "set model.num_experts=2 or more, or choose method 'at' or 'trades'"
        )
    if method == "hydra" and not network.is_sparse:
        raise UserError(
            "method='hydra' prunes channels, but model.keep=1.0 keeps all: set it below 1; "
            "python -m advmoe_jax.cost --target=... finds the value for a cost"
        )
    if method == "standard" and settings.awp:
        raise UserError(
            "loss.awp perturbs the weights of adversarial training; method='standard' has none: "
            "set loss.awp=0, or choose method 'at' or 'trades'"
        )
    balance.check(settings.balance)
    attack = _in_microbatches(attack, microbatches)
    parts = _Parts(network, optimizers, attack, settings, axis_name, microbatches)
    build = {
        "standard": _standard,
        "at": _adversarial,
        "trades": partial(_trades, outputs_of=_logits),
        "hydra": _hydra,
        "joint": partial(_trades, outputs_of=_joint_outputs),
        "advmoe": _advmoe,
    }[method]
    step = build(parts)
    return _averaging(step, settings) if settings.ema_decay else step


def training_attack_loss(method: str) -> str:
    """The loss that a method's training attack maximises."""
    return "cross_entropy" if method in ("standard", "at") else "kl"


def _averaging(step: Step, settings: Settings) -> Step:
    def averaging(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        state, metrics = step(state, images, labels, keys)
        return update_average(state, settings.ema_decay, settings.pruning_steps), metrics

    return averaging


class _Parts(NamedTuple):
    """What every step is made of, and what all of them do."""

    network: Network
    optimizers: Optimizers
    attack: Callable[..., Array]  # see _in_microbatches
    settings: Settings
    axis_name: str | None
    microbatches: int

    def infer(self, state: TrainState, images: Array, noise: Noise | None) -> Output:
        """One pass in inference mode."""
        return self.network.apply(state.params, state.stats, images, noise=_added(noise))[0]

    def noise(self, state: TrainState, keys: Array) -> Noise | None:
        """The step's noise on router scores; None if there is none."""
        settings, shape = self.settings.balance, self.network.score_shape
        if not (settings.is_random and shape):
            return None
        return balance.draw(settings, _fold(keys, 2), state.step, shape)  # 0 and 1 are attacks'

    def balanced(self, loss: Array, routing: Routing | None, noise: Noise | None) -> Array:
        """The loss, and the balancing losses of these routes."""
        settings = self.settings.balance
        if routing is None or not settings.has_loss:
            return loss
        return loss + balance.balancing_loss(settings, routing, noise, self.axis_name)

    def trades_loss(self, natural: Array, attacked: Array, labels: Array) -> Array:
        """CE(f(x), y) + beta KL(f(x) || f(x'))."""
        right = self.classification(natural, labels)
        return right + self.settings.beta * jnp.mean(kl(attacked, natural))

    def classification(self, logits: Array, labels: Array) -> Array:
        """Mean cross-entropy, with smoothed labels if the settings say so."""
        smoothing = self.settings.label_smoothing
        loss = jnp.mean(cross_entropy(logits, labels))
        if not smoothing:
            return loss
        spread = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)))
        return (1 - smoothing) * loss + smoothing * spread

    def descend(
        self,
        state: TrainState,
        loss_fn: Loss,
        branches: Sequence[str],
        batch: Any,
    ) -> tuple[TrainState, Array, Any]:
        """Moves ``branches`` of the parameters, but for the frozen, down the gradient of a loss.

        Under AWP the gradient is taken at perturbed weights of the experts and applied to the
        unperturbed ones, w <- w - lr grad L(w + v) (Wu et al., NeurIPS 2020, algorithm 1); the
        loss, the auxiliary and the statistics are those at w + v, too.

        Args:
            state: where they are.
            loss_fn: (params, stats, batch) -> (mean loss, (stats, auxiliary)), the auxiliary a
                tree of arrays [B, ...].
            branches: of the parameters.
            batch: tree of arrays [B, ...].

        Returns:
            The state with the new parameters and statistics, the loss, the auxiliary.
        """
        frozen = self.settings.frozen
        branches = [name for name in branches if name != frozen]
        params = state.params
        if self.settings.awp and "experts" in branches:
            params = params | self._perturbed_experts(state, loss_fn, batch)
        stats, loss, grads, aux = self._gradients(params, state.stats, loss_fn, branches, batch)
        if frozen:
            stats = {**stats, frozen: state.stats[frozen]}
        return update(state._replace(stats=stats), grads, self.optimizers), loss, aux

    def _perturbed_experts(self, state: TrainState, loss_fn: Loss, batch: Any) -> Tree:
        grads = self._gradients(state.params, state.stats, loss_fn, ["experts"], batch)[2]
        # Not a cond: in one, the gradients of convolutions are slow on CPU.
        warm = state.step >= self.settings.awp_warmup_steps
        gamma = jnp.where(warm, self.settings.awp, 0.0)
        experts = state.params["experts"]
        moved = awp.perturbation(experts, grads["experts"], gamma)
        return {"experts": jax.tree.map(jnp.add, experts, moved)}

    def _gradients(
        self, params: Tree, stats: Tree, loss_fn: Loss, branches: Sequence[str], batch: Any
    ) -> tuple[Tree, Array, Tree, Any]:
        """(statistics, loss, gradients of the branches over all devices, auxiliary)."""
        moving = {name: params[name] for name in branches}

        def one(stats: Tree, part: Any) -> tuple[Tree, Array, Tree, Any]:
            def of_branches(moving: Tree) -> tuple[Array, Any]:
                return loss_fn(params | moving, stats, part)

            (loss, (stats, aux)), grads = jax.value_and_grad(of_branches, has_aux=True)(moving)
            return stats, loss, grads, aux

        def add(carry: tuple[Tree, Any], part: Any) -> tuple[tuple[Tree, Any], Any]:
            stats, *new, aux = one(carry[0], part)
            return (stats, jax.tree.map(jnp.add, carry[1], new)), aux

        if self.microbatches == 1:
            stats, loss, grads, aux = one(stats, batch)
        else:
            sums = [jnp.zeros(()), jax.tree.map(jnp.zeros_like, moving)]
            carry, aux = lax.scan(add, (stats, sums), _split(batch, self.microbatches))
            stats, (loss, grads) = carry[0], jax.tree.map(lambda x: x / self.microbatches, carry[1])
            aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux)
        return stats, loss, self.mean(grads), aux

    def mean(self, tree: Any) -> Any:
        """Averages every array over the devices."""
        return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)


def _standard(parts: _Parts) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        batch = (images, labels, parts.noise(state, keys))
        new, loss, output = parts.descend(
            state, _cross_entropy_loss(parts), ["router", "experts"], batch
        )
        metrics = {"loss": loss, "standard_accuracy": _accuracy(output.logits, labels)}
        return _finish(parts, new, metrics | routing_metrics(output.routing))

    return step


def _cross_entropy_loss(parts: _Parts) -> Loss:
    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, labels, noise = batch
        output, stats = parts.network.apply(
            params, stats, images, train=True, noise=_added(noise), axis_name=parts.axis_name
        )
        loss = parts.classification(output.logits, labels)
        return parts.balanced(loss, output.routing, noise), (stats, output)

    return loss_fn


def _adversarial(parts: _Parts) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = parts.noise(state, keys)
        clean = parts.infer(state, images, noise)
        adversarial = parts.attack(
            lambda x, noise: parts.infer(state, x, noise).logits, images, labels, keys, None, noise
        )
        batch = (adversarial, labels, noise)
        new, loss, output = parts.descend(
            state, _cross_entropy_loss(parts), ["router", "experts"], batch
        )
        metrics = {
            "loss": loss,
            "standard_accuracy": _accuracy(clean.logits, labels),
            "robust_accuracy": _accuracy(output.logits, labels),
        }
        return _finish(parts, new, metrics | routing_metrics(clean.routing, output.routing))

    return step


def _hydra(parts: _Parts) -> Step:
    learn_scores = _trades(parts, _logits, ["router"], surrogate=True)
    train_kernels = _trades(parts, _logits, ["experts"], surrogate=False)

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        is_pruning = state.step < parts.settings.pruning_steps
        return lax.cond(is_pruning, learn_scores, train_kernels, state, images, labels, keys)

    return step


def _trades(
    parts: _Parts,
    outputs_of: Callable[[Output], Any],
    branches: Sequence[str] = ("router", "experts"),
    surrogate: bool | None = None,
) -> Step:
    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = parts.noise(state, keys)
        clean = outputs_of(parts.infer(state, images, noise))
        adversarial = parts.attack(
            lambda x, noise: outputs_of(parts.infer(state, x, noise)),
            *(images, None, keys, clean, noise),
        )

        def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
            images, adversarial, labels, noise = batch
            passes = {"train": True, "surrogate": surrogate, "axis_name": parts.axis_name}
            passes["noise"] = _added(noise)
            natural, stats = parts.network.apply(params, stats, images, **passes)
            attacked, stats = parts.network.apply(params, stats, adversarial, **passes)
            loss = parts.trades_loss(natural.logits, attacked.logits, labels)
            loss = parts.balanced(loss, natural.routing, noise)
            return loss, (stats, (natural, attacked))

        batch = (images, adversarial, labels, noise)
        new, loss, (natural, attacked) = parts.descend(state, loss_fn, branches, batch)
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
    ](parts)

    def experts_loss(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        def follow(stats: Tree, images: Array, routing: Routing | None) -> tuple[Array, Tree]:
            output, stats = network.apply(
                params, stats, images, train=True, routing=routing, axis_name=parts.axis_name
            )
            return output.logits, stats

        (*natural_batch, labels), attacked_batch = batch
        natural, stats = follow(stats, *natural_batch)
        attacked, stats = follow(stats, *attacked_batch)
        return parts.trades_loss(natural, attacked, labels), (stats, attacked)

    def train_experts(
        state: TrainState, images: Array, labels: Array, keys: Array, clean: Output, noise: Any
    ) -> tuple[TrainState, Array, Output]:
        """The state, the loss, and what the network said of the attacked images."""
        adversarial = _joint_attack(parts, state, images, clean, keys, noise)
        routing = network.route(state.params, state.stats, adversarial, noise=_added(noise))[0]
        batch = ((images, clean.routing, labels), (adversarial, routing))
        state, loss, attacked = parts.descend(state, experts_loss, ["experts"], batch)
        return state, loss, Output(attacked, routing)

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        noise = parts.noise(state, keys)
        clean = parts.infer(state, images, noise)
        now, losses = clean, {}
        if settings.frozen != "experts":
            state, losses["loss"], attacked = train_experts(
                state, images, labels, _fold(keys, 0), clean, noise
            )
            moved = network.apply(state.params, state.stats, images, routing=clean.routing)[0]
            now = Output(moved.logits, clean.routing)
        if settings.frozen != "router":
            adversarial = _joint_attack(parts, state, images, now, _fold(keys, 1), noise)
            if settings.frozen:
                attacked = parts.infer(state, adversarial, noise)
            batch = (images, adversarial, labels, noise)
            state, losses["router_loss"], _ = parts.descend(state, train_router, ["router"], batch)
        metrics = {
            "loss": losses.get("loss", losses.get("router_loss")),
            **losses,
            "standard_accuracy": _accuracy(clean.logits, labels),
            "robust_accuracy": _accuracy(attacked.logits, labels),
        }
        return _finish(parts, state, metrics | routing_metrics(clean.routing, attacked.routing))

    return step


def _pathway_loss(parts: _Parts) -> Loss:
    """TRADES' loss as the fixed experts see it through the gate."""

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, noise = batch
        passes = {"train_router": True, "noise": _added(noise), "axis_name": parts.axis_name}
        natural, stats = parts.network.apply(params, stats, images, **passes)
        attacked, stats = parts.network.apply(params, stats, adversarial, **passes)
        loss = parts.trades_loss(natural.logits, attacked.logits, labels)
        return parts.balanced(loss, natural.routing, noise), (stats, None)

    return loss_fn


def _assignment_loss(parts: _Parts) -> Loss:
    """alpha CE(r(x), y mod N) + beta KL(r(x) || r(x')): class y belongs to expert y mod N."""

    def loss_fn(params: Tree, stats: Tree, batch: Any) -> tuple[Array, Any]:
        images, adversarial, labels, noise = batch
        experts = _assigned(labels, parts.network.num_experts)
        passes = {"train": True, "noise": _added(noise), "axis_name": parts.axis_name}
        natural, stats = parts.network.route(params, stats, images, **passes)
        attacked, stats = parts.network.route(params, stats, adversarial, **passes)
        assigned = parts.settings.alpha * jnp.mean(cross_entropy(natural.scores, experts))
        smooth = parts.settings.beta * jnp.mean(kl(attacked.scores, natural.scores))
        return parts.balanced(assigned + smooth, natural, noise), (stats, None)

    return loss_fn


def _assigned(labels: Array, num_experts: int) -> Array:
    """y mod N; of distributions over the classes, the distribution over the experts."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return labels % num_experts
    return labels @ jax.nn.one_hot(jnp.arange(labels.shape[-1]) % num_experts, num_experts)


def _joint_attack(
    parts: _Parts,
    state: TrainState,
    images: Array,
    clean: Output,
    keys: Array,
    noise: Noise | None,
) -> Array:
    """Maximises KL(f(x) || f(x')) + KL(r(x) || r(x'))."""
    return parts.attack(
        lambda x, noise: _joint_outputs(parts.infer(state, x, noise)),
        *(images, None, keys, _joint_outputs(clean), noise),
    )


def _in_microbatches(attack: Attack, count: int) -> Callable[..., Array]:
    """The same attack on a function of images and noise, one part of the batch after the other."""

    def whole(
        function: Callable[[Array, Noise | None], Any],
        images: Array,
        labels: Array | None,
        keys: Array,
        clean_outputs: Any,
        noise: Noise | None,
    ) -> Array:
        return attack(lambda x: function(x, noise), images, labels, keys, clean_outputs)

    def in_parts(
        function: Callable[[Array, Noise | None], Any], images: Array, *others: Any
    ) -> Array:
        parts = _split((images, *others), count)
        adversarial = lax.map(lambda part: whole(function, *part), parts)
        return adversarial.reshape(images.shape)

    return whole if count == 1 else in_parts


def _split(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...] of every array."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)


def _logits(output: Output) -> Array:
    return output.logits


def _joint_outputs(output: Output) -> tuple[Array, Array]:
    return output.logits, output.routing.scores


def _added(noise: Noise | None) -> Array | None:
    return None if noise is None else noise.added


def _accuracy(logits: Array, labels: Array) -> Array:
    if jnp.issubdtype(labels.dtype, jnp.floating):
        labels = jnp.argmax(labels, axis=-1)
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
