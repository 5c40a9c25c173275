"""Attacks that know of a mixture of experts: what they look at, and those on its router.

A network that routes every image to a few of its experts is a piecewise function: its gradient
says nothing of the route. These attacks look at more than its logits. Nothing here imports a
model; whatever can be written as ``Routed``, four functions of arrays, can be attacked.

Which function is *attacked* (differentiated) and which one *judges* (whose error counts) are two
questions:

====================  ================================================  ===========================
attack                attacked                                          judge
====================  ================================================  ===========================
``route_attack``      the router's scores: leave the clean route        the network
``joint_attack``      the network's loss and the router's, together     the network
``gate_attack``       the network with a gate that has a gradient       the network
``worst_pathway``     each pathway an attacker could reach, held fixed  that pathway, held fixed
====================  ================================================  ===========================

Only the first three give adversarial images of the network as it is. ``worst_pathway`` is a
diagnostic, and a bound from below: that its image would keep the network on the pathway it fools
is not asked. With ``frozen=True`` it looks at the clean image's pathway alone, which is the attack
on the experts of the AdvMoE paper (Zhang et al., ICCV 2023, section 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from advmoe_jax.attacks.constraints import AnyImages, Threat
from advmoe_jax.attacks.judged import Judged, judged_steps
from advmoe_jax.attacks.losses import cross_entropy
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import Batch, Stepwise, as_attack
from advmoe_jax.types import Array, Labels, Logits

Scores = Float[Array, "batch decisions experts"]
Chosen = Int[Array, "batch decisions k"]


class Answer(NamedTuple):
    """What a routed function says of images; one decision per image is ``decisions`` = 1.

    Attributes:
        logits: of the classes.
        scores: of all experts.
        indices: the experts chosen.
    """

    logits: Logits
    scores: Scores
    indices: Chosen


class Routed(NamedTuple):
    """A mixture of experts as functions of images [B, ...], each image alone.

    Calling it gives the logits, so that every other attack takes it too. Functions are
    ``jax.tree_util.Partial`` where their arrays shall be arguments of what is compiled.

    Attributes:
        classify: images -> ``Answer``: the function itself, with its true gradient.
        follow: (images, indices) -> logits of the experts named, whatever the router says.
        mix: (images, weights like the scores) -> logits of all experts at once, each expert's
            output weighed; differentiable in both.
        weigh: scores -> weights like the scores, 0 for experts that are not chosen: what the gate
            gives. ``mix(x, weigh(scores))`` is ``classify(x).logits``, at the cost of all experts.
    """

    classify: Callable[[Array], Answer]
    follow: Callable[[Array, Chosen], Logits]
    mix: Callable[[Array, Scores], Logits]
    weigh: Callable[[Scores], Scores]

    def __call__(self, images: AnyImages) -> Logits:
        """The logits alone."""
        return self.classify(images).logits


class _Rerouted(NamedTuple):
    """Outputs of an attack on the route; ``chosen`` is 1 for the clean route's experts, else 0."""

    logits: Logits
    scores: Scores
    chosen: Scores


def route_attack(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Attack:
    """APGD on the router: leave the clean route.

    Maximises, summed over decisions, the margin by which the best expert off the clean route beats
    the worst one on it. The classifier's loss is not looked at, but of all points passed one that
    the network misclassifies is kept. The function attacked must be ``Routed``. If every expert is
    always chosen, no route can be left, and images stay at their random start.

    Raises:
        ValueError: if a setting is not valid.
    """
    return as_attack(threat, route_steps(threat, num_steps=num_steps, restarts=restarts))


def route_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """``route_attack`` cut into steps."""

    def value(outputs: _Rerouted, labels: Labels) -> Float[Array, " batch"]:
        return jnp.sum(margin_off(outputs.scores, outputs.chosen), axis=-1)

    return judged_steps(
        threat, _rerouted, value, look=answer_to, num_steps=num_steps, restarts=restarts
    )


def joint_attack(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Attack:
    """APGD on loss and route at once, as AdvMoE's training attack aims at both.

    Maximises the cross-entropy of the logits plus -log of the probability (softmax of the scores)
    of the clean route's experts, averaged over decisions; both in nats (Zhang et al., ICCV 2023,
    eq. 4, with labels in the place of clean outputs). The function attacked must be ``Routed``. If
    every expert is always chosen, only the first term is left.

    Raises:
        ValueError: if a setting is not valid.
    """
    return as_attack(threat, joint_steps(threat, num_steps=num_steps, restarts=restarts))


def joint_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """``joint_attack`` cut into steps."""

    def value(outputs: _Rerouted, labels: Labels) -> Float[Array, " batch"]:
        log_probs = jax.nn.log_softmax(outputs.scores.astype(jnp.float32))
        kept = jax.nn.logsumexp(log_probs, axis=-1, b=outputs.chosen)
        return cross_entropy(outputs.logits, labels) - jnp.sum(kept, axis=-1) / kept.shape[1]

    return judged_steps(
        threat, _rerouted, value, look=answer_to, num_steps=num_steps, restarts=restarts
    )


def margin_off(scores: Scores, route: Scores) -> Float[Array, "batch decisions"]:
    """Best score off a route minus the worst on it; ``route`` is 1 for its experts, else 0.

    0 where no expert is off the route.
    """
    scores = scores.astype(jnp.float32)
    off = jnp.max(jnp.where(route > 0, -jnp.inf, scores), axis=-1)
    margin = off - jnp.min(jnp.where(route > 0, scores, jnp.inf), axis=-1)
    return jnp.where(jnp.isfinite(off), margin, 0.0)


def answer_to(function: Routed, images: Array) -> Answer:
    """What an attack on the route must know of the clean images.

    Raises:
        ValueError: if the function is not ``Routed``.
    """
    if not hasattr(function, "classify"):
        raise ValueError(
            "this attack looks at routes: give it a Routed function, not one of images alone"
        )
    return function.classify(images)


def _rerouted(function: Routed, batch: Batch) -> Callable[[Array], Judged]:
    clean = batch.clean
    chosen = jnp.sum(jax.nn.one_hot(clean.indices, clean.scores.shape[-1]), axis=-2)

    def shown(images: Array) -> Judged:
        answer = function.classify(images)
        return Judged(_Rerouted(answer.logits, answer.scores, chosen), answer.logits)

    return shown
