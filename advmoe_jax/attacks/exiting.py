"""Attacks that know at which exit an image leaves: what the paper of RDI-Nets leaves out.

Its attacks (``exits``) never look at the thresholds, and so never at the network that is deployed.
Here the deployed network judges every point, and the thresholds are known:

- ``exit_steps``, ``average_steps``: the paper's losses under APGD;
- ``taken_steps``: the loss of the exit that an image takes at the moment;
- ``steer_steps``: for each exit in turn, move the image there and fool it;
- ``joint_steps``: of a mixture, the exits' losses and the route together, as AdvMoE's attack;
- ``slow_down``: not the answer but the cost: keep the image in for as long as possible.

Whatever can be written as ``Exiting`` can be attacked.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from advmoe_jax.attacks.apgd import apgd
from advmoe_jax.attacks.constraints import AnyImages, Threat
from advmoe_jax.attacks.exits import ExitLogits, total_loss
from advmoe_jax.attacks.judged import Judged, judged_steps
from advmoe_jax.attacks.losses import Loss, cross_entropy
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import Batch, Stepwise
from advmoe_jax.types import Array, Labels, Logits

MARGIN = 0.05  # nats: how far behind a threshold an entropy is pushed


class Seen(NamedTuple):
    """What a network with exits says of images.

    Attributes:
        exits: the logits of every exit, the main one last.
        excess: of each side exit, its entropy minus its threshold: an image leaves at the first
            exit where it is negative.
        scores: of the router of a mixture, None without.
        indices: the experts chosen, likewise.
    """

    exits: ExitLogits
    excess: Float[Array, "batch side_exits"]
    scores: Float[Array, "batch decisions experts"] | None = None
    indices: Int[Array, "batch decisions k"] | None = None


class Exiting(NamedTuple):
    """A network that images leave early, as a function of images, each image alone.

    Calling it gives the logits of the exit that is taken, so that every other attack takes it too.

    Attributes:
        look: images -> ``Seen``.
    """

    look: Callable[[Array], Seen]

    def __call__(self, images: AnyImages) -> Logits:
        """The logits of the exit that each image leaves at."""
        return decided(self.look(images))


def decided(seen: Seen) -> Logits:
    """The logits of the exit that each image leaves at."""
    leaves = jnp.concatenate(
        [seen.excess < 0, jnp.ones_like(seen.excess, bool, shape=(len(seen.excess), 1))], axis=1
    )
    taken = jnp.argmax(leaves, axis=1)
    return jnp.take_along_axis(jnp.stack(seen.exits, 1), taken[:, None, None], axis=1)[:, 0]


class _Aimed(NamedTuple):
    """What a loss is of: ``Seen``, the exit an attack heads for, the clean image's experts."""

    seen: Seen
    goal: Int[Array, " batch"]
    chosen: Float[Array, "batch decisions experts"] | None


def _shown(function: Exiting, batch: Batch) -> Callable[[Array], Judged]:
    chosen = None
    if batch.clean.indices is not None:
        flags = jax.nn.one_hot(batch.clean.indices, batch.clean.scores.shape[-1])
        chosen = jnp.sum(flags, axis=-2)

    def shown(images: Array) -> Judged:
        seen = function.look(images)
        return Judged(_Aimed(seen, batch.restart, chosen), decided(seen))

    return shown


def _steps(
    threat: Threat, value: Callable[[_Aimed, Labels], Array], num_steps: int, restarts: int
) -> Stepwise:
    look = lambda function, images: function.look(images)  # noqa: E731
    settings = {"num_steps": num_steps, "restarts": restarts}
    return judged_steps(threat, _shown, value, look=look, **settings)


def exit_steps(threat: Threat, number: int, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """APGD on the cross-entropy of exit ``number``, from 0; -1: the main one."""

    def value(aimed: _Aimed, labels: Labels) -> Array:
        return cross_entropy(aimed.seen.exits[number], labels)

    return _steps(threat, value, num_steps, restarts)


def average_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """APGD on the mean over all exits of the cross-entropy."""

    def value(aimed: _Aimed, labels: Labels) -> Array:
        return total_loss(aimed.seen.exits, labels) / len(aimed.seen.exits)

    return _steps(threat, value, num_steps, restarts)


def taken_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """APGD on the cross-entropy of the exit that is taken: of the dynamic network itself."""

    def value(aimed: _Aimed, labels: Labels) -> Array:
        return cross_entropy(decided(aimed.seen), labels)

    return _steps(threat, value, num_steps, restarts)


def steer_steps(threat: Threat, num_exits: int, *, num_steps: int = 100) -> Stepwise:
    """APGD towards each exit in turn: the image is to leave there, and to be wrong there.

    For exit g: CE(f_g(x), y) - sum over i < g of max(0, m + T_i - H_i) - max(0, m + H_g - T_g),
    with entropies H, thresholds T and the margin m = ``MARGIN``; the last term is none of the main
    exit's. An image is tried at every exit, hence at the one that is easiest to fool.
    """

    def value(aimed: _Aimed, labels: Labels) -> Array:
        seen, goal = aimed.seen, aimed.goal[:, None]
        losses = jnp.stack([cross_entropy(logits, labels) for logits in seen.exits], axis=1)
        numbers = jnp.arange(seen.excess.shape[1])
        early = jnp.maximum(0, MARGIN - seen.excess) * (numbers < goal)
        late = jnp.maximum(0, MARGIN + seen.excess) * (numbers == goal)
        return jnp.take_along_axis(losses, goal, 1)[:, 0] - jnp.sum(early + late, axis=1)

    return _steps(threat, value, num_steps, num_exits)


def joint_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """APGD on exits and router of a mixture together.

    Maximises the mean over all exits of the cross-entropy plus -log of the probability of the clean
    route's experts, averaged over decisions (as ``routed.joint_steps``).
    """

    def value(aimed: _Aimed, labels: Labels) -> Array:
        exits = aimed.seen.exits
        log_probs = jax.nn.log_softmax(aimed.seen.scores.astype(jnp.float32))
        kept = jax.nn.logsumexp(log_probs, axis=-1, b=aimed.chosen)
        return total_loss(exits, labels) / len(exits) - jnp.mean(kept, axis=-1)

    return _steps(threat, value, num_steps, restarts)


def slow_down(threat: Threat, *, num_steps: int = 100) -> Attack:
    """APGD that raises the entropies of all side exits over their thresholds.

    Maximises the sum over side exits of min(H - T, m), m = ``MARGIN``: what an image costs,
    whatever it is taken for. The function attacked must be ``Exiting``.
    """
    loss = Loss(
        lambda seen, labels: jnp.sum(jnp.minimum(seen.excess, MARGIN), axis=1),
        lambda seen, labels: jnp.all(seen.excess >= MARGIN, axis=1),
    )
    inner = apgd(threat, loss=loss, num_steps=num_steps)

    def attack(
        function: Exiting, images: Array, labels: Array, key: Array, clean_outputs: Any = None
    ) -> Array:
        return inner(function.look, images, labels, key)

    return attack
