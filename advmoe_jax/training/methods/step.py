"""What every training method is made of: the step's signature, its settings, the update.

A method is a record, ``Method``, in a file of its family; ``methods.METHODS`` lists them. Steps are
pure functions from (state, batch) to (state, metrics) and know no loop. They work on one device's
part of the batch: gradients, metrics and BatchNorm statistics are averaged over ``axis_name`` if
one is given, so the same step runs alone, under ``shard_map`` and under ``pmap``. Attacks see the
network in inference mode.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks import Threat, cross_entropy, kl, pgd
from advmoe_jax.models.network import Network
from advmoe_jax.models.output import Output
from advmoe_jax.parallel import DATA_AXIS, EXPERT_AXIS
from advmoe_jax.routing import measures
from advmoe_jax.routing.choice import Routing
from advmoe_jax.training import awp, balance
from advmoe_jax.training.balance import Balance, Noise
from advmoe_jax.training.methods.microbatches import split
from advmoe_jax.training.state import Optimizers, TrainState, update
from advmoe_jax.types import Array, Axes, Tree

# (params, stats, batch) -> (mean loss, (stats, auxiliary)); see ``Setup.descend``.
Loss = Callable[[Tree, Tree, Any], tuple[Array, Any]]
# Parts of a network that choose: adversarial weight perturbation leaves them as they are.
_CHOOSING = ("router", "scores")


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


class ExitSettings(NamedTuple):
    """How a network with side exits is trained by ``multi_exit``.

    Attributes:
        defence: what the training attack is on: ``main``, ``exit1`` and so on (a side exit),
            ``average``, ``max_average``; ``none``: clean images alone.
        weights: of each exit's loss, the main one last; empty: 1 each.
        objective: one of ``multi_exit.OBJECTIVES``.
        attack_mode: ``inference``, or ``train`` as published.
    """

    defence: str = "max_average"
    weights: tuple[float, ...] = ()
    objective: str = "halves"
    attack_mode: str = "inference"


class Settings(NamedTuple):
    """What the losses weigh, and what is done besides descending them.

    Attributes:
        beta: weight of the KL terms.
        alpha: weight of the router's cross-entropy under the ``assignment`` objective.
        pruning_steps: steps in which ``hydra`` learns scores, before those that train kernels.
        router_objective: of ``advmoe``, see there.
        router_attack: of ``advmoe``'s router update, one of ``advmoe.ATTACKED``.
        class_experts: the expert of each class, for the objective ``assignment``; empty: y mod N.
        threat: of the training attack; what the ``certified`` objective bounds routes against.
        consistency: in the update of ``advmoe``'s experts, weight of KL(f(x) || g(x')), g the
            network along another pathway, drawn at random: every pathway is to answer alike.
        label_smoothing: share of the cross-entropy's target that is spread over all classes
            (Szegedy et al., CVPR 2016, section 7).
        awp: relative size of the adversarial perturbation of the weights, under which their
            gradient is taken (see ``awp.perturbation``); 0: none.
        awp_warmup_steps: steps before the first such perturbation.
        ema_decay: of the average of the weights, see ``state.update_average``; 0: none is kept.
        balance: what keeps the router from collapsing.
        frozen: name of a part that keeps its parameters and statistics; empty: all are trained.
        exits: of ``multi_exit``.
    """

    beta: float = 6.0
    alpha: float = 6.0
    router_objective: str = "pathway"
    router_attack: str = "joint"
    class_experts: tuple[int, ...] = ()
    threat: Threat | None = None
    consistency: float = 0.0
    pruning_steps: int = 0
    label_smoothing: float = 0.0
    awp: float = 0.0
    awp_warmup_steps: int = 0
    ema_decay: float = 0.0
    balance: Balance = Balance()
    frozen: str = ""
    exits: ExitSettings = ExitSettings()


class Start(NamedTuple):
    """What a method starts from instead of random parameters: a trained network of its own kind.

    Attributes:
        run: the config value that names the directory of the trained run, dotted.
        missing: what is said if it names none.
        trained_as: changes of this run's model, by name, that make it the trained one's.
        trained_part: initial parameters -> those of them that the trained network has.
        combine: (initial parameters, trained parameters) -> parameters to start from.
    """

    run: str
    missing: str
    trained_as: Mapping[str, Any]
    trained_part: Callable[[Tree], Tree]
    combine: Callable[[Tree, Tree], Tree]


class AttackSettings(NamedTuple):
    """The words of a training attack.

    Attributes:
        threat: the ball and the pixel range.
        num_steps: of PGD.
        step_size: in units of the pixel range.
    """

    threat: Threat
    num_steps: int
    step_size: float


class Method(NamedTuple):
    """A training method: all that anybody must know of it.

    Attributes:
        about: what it is, and whose, in a line.
        build: what makes its step.
        attack_loss: what its training attack maximises, one of ``attacks.LOSSES``.
        selected_by: the validation metric that chooses the best checkpoint, with these settings.
        check: raises UserError if a network or settings do not suit it.
        start: what it starts from; None: random parameters, or the run that the user names.
        lengths: (epochs of the run, epochs of pruning) -> epochs in which each part is trained, by
            part; parts that it does not name are trained in all of them.
        own_attack: what makes its training attack, if it is not PGD on ``attack_loss``.
    """

    about: str
    build: Callable[["Setup"], Step]
    attack_loss: str = "kl"
    selected_by: Callable[[Settings], str] = lambda settings: "robust_accuracy"
    check: Callable[[Network, Settings], None] = lambda network, settings: None
    start: Start | None = None
    lengths: Callable[[int, int], Mapping[str, int]] = lambda num_epochs, pruning_epochs: {}
    own_attack: Callable[[AttackSettings, Settings], Any] | None = None

    def attack(self, words: AttackSettings, settings: Settings) -> Any:
        """The training attack.

        Raises:
            ValueError: if it cannot be made.
        """
        if self.own_attack is not None:
            return self.own_attack(words, settings)
        start = "gaussian" if self.attack_loss == "kl" else "uniform"
        return pgd(**words._asdict(), loss=self.attack_loss, start=start)


class Setup(NamedTuple):
    """What every step is made of, and what all of them do."""

    network: Network
    optimizers: Optimizers
    attack: Callable[..., Array]  # see in_microbatches
    settings: Settings
    axis_name: Axes | None
    microbatches: int

    def infer(self, state: TrainState, images: Array, noise: Noise | None) -> Output:
        """One pass in inference mode."""
        return self.network.apply(state.params, state.stats, images, noise=added(noise))[0]

    def diverge(
        self,
        state: TrainState,
        images: Array,
        clean: Output,
        keys: Array,
        noise: Noise | None,
        outputs_of: Callable[[Output], Any],
    ) -> Array:
        """Attacked images, on which these outputs are to differ from what they are on the clean."""
        return self.attack(
            lambda x, noise: outputs_of(self.infer(state, x, noise)),
            *(images, None, keys, outputs_of(clean), noise),
        )

    def noise(self, state: TrainState, keys: Array) -> Noise | None:
        """The step's noise on router scores; None if there is none."""
        settings, shape = self.settings.balance, self.network.score_shape
        if not (settings.is_random and shape):
            return None
        return balance.draw(settings, fold(keys, 2), state.step, shape)  # 0 and 1 are attacks'

    def balanced(self, loss: Array, routing: Routing | None, noise: Noise | None) -> Array:
        """The loss, and the balancing losses of these routes."""
        settings = self.settings.balance
        if routing is None or not settings.has_loss:
            return loss
        routers = self.network.num_routers
        return loss + balance.balancing_loss(settings, routing, noise, self.axis_name, routers)

    def dropout(self, keys: Array) -> Array | None:
        """One key per image of what a pass in training mode drops; None if it drops nothing."""
        return fold(keys, 3) if self.network.is_stochastic else None

    def routing_metrics(self, clean: Routing | None, attacked: Routing | None = None) -> Tree:
        """See ``routing_metrics``."""
        return routing_metrics(clean, attacked, self.network.num_routers)

    def trades_loss(self, natural: Array, attacked: Array, labels: Array) -> Array:
        """CE(f(x), y) + beta KL(f(x) || f(x')), summed over exits if there are several."""
        right = self.classification(natural, labels)
        return right + self.settings.beta * jnp.mean(kl(attacked, natural))

    def classification(self, logits: Array, labels: Array) -> Array:
        """Mean cross-entropy, with smoothed labels if the settings say so; of exits the sum."""
        smoothing = self.settings.label_smoothing
        loss = jnp.mean(cross_entropy(logits, labels))
        if not smoothing:
            return loss
        exits = logits.shape[1] if logits.ndim == 3 else 1
        spread = -exits * jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)))
        return (1 - smoothing) * loss + smoothing * spread

    def descend(
        self, state: TrainState, loss_fn: Loss, parts: Sequence[str], batch: Any
    ) -> tuple[TrainState, Array, Any]:
        """Moves ``parts`` of the parameters, but for the frozen, down the gradient of a loss.

        Under AWP the gradient is taken at perturbed weights and applied to the unperturbed ones,
        w <- w - lr grad L(w + v) (Wu et al., NeurIPS 2020, algorithm 1); the loss, the auxiliary
        and the statistics are those at w + v, too.

        Args:
            state: where they are.
            loss_fn: (params, stats, batch) -> (mean loss, (stats, auxiliary)), the auxiliary a
                tree of arrays [B, ...].
            parts: names of those to move.
            batch: tree of arrays [B, ...].

        Returns:
            The state with the new parameters and statistics, the loss, the auxiliary.
        """
        frozen = self.settings.frozen
        parts = [name for name in parts if name != frozen]
        params = state.params
        perturbed = [name for name in parts if name not in _CHOOSING]
        if self.settings.awp and perturbed:
            params = params | self._perturbed(state, loss_fn, perturbed, batch)
        stats, loss, grads, aux = self._gradients(params, state.stats, loss_fn, parts, batch)
        if frozen:
            stats = {**stats, frozen: state.stats[frozen]}
        if share := self.settings.balance.shared_steps:
            stacked = self.stacked(parts)
            spread = EXPERT_AXIS in (self.axis_name or ())
            grads = balance.share_steps(grads, stacked, share, EXPERT_AXIS if spread else None)
        return update(state._replace(stats=stats), grads, self.optimizers), loss, aux

    def _perturbed(
        self, state: TrainState, loss_fn: Loss, parts: Sequence[str], batch: Any
    ) -> Tree:
        grads = self._gradients(state.params, state.stats, loss_fn, parts, batch)[2]
        # Not a cond: in one, the gradients of convolutions are slow on CPU.
        warm = state.step >= self.settings.awp_warmup_steps
        gamma = jnp.where(warm, self.settings.awp, 0.0)
        weights = {name: state.params[name] for name in parts}
        moved = awp.perturbation(weights, grads, gamma, self.stacked(parts))
        return jax.tree.map(jnp.add, weights, moved)

    def _gradients(
        self, params: Tree, stats: Tree, loss_fn: Loss, parts: Sequence[str], batch: Any
    ) -> tuple[Tree, Array, Tree, Any]:
        """(statistics, loss, gradients of the parts over all devices, auxiliary)."""
        moving = {name: params[name] for name in parts}

        def one(stats: Tree, share: Any) -> tuple[Tree, Array, Tree, Any]:
            def of_parts(moving: Tree) -> tuple[Array, Any]:
                return loss_fn(params | moving, stats, share)

            (loss, (stats, aux)), grads = jax.value_and_grad(of_parts, has_aux=True)(moving)
            return stats, loss, grads, aux

        def add(carry: tuple[Tree, Any], share: Any) -> tuple[tuple[Tree, Any], Any]:
            stats, *new, aux = one(carry[0], share)
            return (stats, jax.tree.map(jnp.add, carry[1], new)), aux

        if self.microbatches == 1:
            stats, loss, grads, aux = one(stats, batch)
        else:
            sums = [jnp.zeros(()), jax.tree.map(jnp.zeros_like, moving)]
            carry, aux = lax.scan(add, (stats, sums), split(batch, self.microbatches))
            stats, (loss, grads) = carry[0], jax.tree.map(lambda x: x / self.microbatches, carry[1])
            aux = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), aux)
        return stats, loss, self.mean_gradients(grads), aux

    def mean(self, tree: Any) -> Any:
        """Averages every array over the devices."""
        return tree if self.axis_name is None else lax.pmean(tree, self.axis_name)

    def mean_gradients(self, grads: Tree) -> Tree:
        """Averages the gradients of some parts over the devices.

        Those of experts on the devices of an axis of their own are sums over that axis already:
        the choices of all its devices came to where the expert is.
        """
        if self.axis_name is None or EXPERT_AXIS not in self.axis_name:
            return self.mean(grads)

        def mean(gradient: Array, is_stacked: bool) -> Array:
            if not is_stacked:
                return self.mean(gradient)
            return lax.pmean(gradient, DATA_AXIS) / lax.axis_size(EXPERT_AXIS)

        return jax.tree.map(mean, grads, self.stacked(grads))

    def stacked(self, parts: Iterable[str]) -> Tree:
        """Whether the first axis of a parameter counts experts, for the parameters of parts."""
        return {name: self.network.stacked[name] for name in parts}

    def finish(self, state: TrainState, metrics: Tree) -> tuple[TrainState, Tree]:
        """The state with its step counted, and the metrics over all devices."""
        metrics = jax.tree.map(lambda x: lax.stop_gradient(x).astype(jnp.float32), metrics)
        return state._replace(step=state.step + 1), self.mean(metrics)


def answers_of(output: Output) -> Array:
    """What an attack on the classifier looks at: its logits, or those of every exit."""
    return output.answers


def joint_outputs(output: Output) -> tuple[Array, Array]:
    """What AdvMoE's joint attack looks at: logits, or those of every exit, and the scores."""
    return output.answers, output.routing.scores


def added(noise: Noise | None) -> Array | None:
    """What is added to the router's scores."""
    return None if noise is None else noise.added


def accuracy(logits: Array, labels: Array) -> Array:
    """The share of images that are classified correctly, by the main one of several exits.

    Of mixed labels the largest counts.
    """
    logits = logits[:, -1] if logits.ndim == 3 else logits
    if jnp.issubdtype(labels.dtype, jnp.floating):
        labels = jnp.argmax(labels, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def routing_metrics(
    clean: Routing | None, attacked: Routing | None = None, routers: int | None = None
) -> Tree:
    """{"routing": ...} of a batch, or {} for a network without a router.

    ``load`` float32 [N]: share of the choices that fall on each expert; ``entropy``: mean entropy
    of softmax(scores), in nats; ``agreement``: share of images, or of tokens, whose first choice
    survives the attack (if ``attacked`` is given). Several layers: means over them, and ``layers``
    holds ``load`` [L, N], ``entropy`` [L] and ``agreement`` [L]. ``routers``: number of layers;
    None: one for each decision.
    """
    if clean is None:
        return {}

    def of_layers(x: Array) -> Array:
        return measures.of_layers(x, routers)

    measured = {
        "load": measures.load(of_layers(clean.indices), clean.scores.shape[-1]),
        "entropy": jnp.mean(of_layers(measures.entropy(clean.scores)), axis=0),
    }
    if attacked is not None:
        chosen = (of_layers(routing.indices) for routing in (clean, attacked))
        measured["agreement"] = measures.agreement(*chosen)
    return {"routing": measures.by_decision(measured)}


def fold(keys: Array, data: int) -> Array:
    """A new key per image."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)
