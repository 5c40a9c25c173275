"""Attacks that know of a mixture of experts: on its router, on its experts, through its gate.

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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.apgd import CLASSES, apgd, apgd_steps
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.losses import Loss, cross_entropy, make_loss
from advmoe_jax.attacks.pgd import Attack, per_image_keys
from advmoe_jax.attacks.stepwise import Stepwise, as_attack, select

Array = jax.Array
GATES = ("straight_through", "softmax", "hard")
# A router that finds all experts alike has no spread to measure noise by.
_LEAST_SPREAD = 1e-6


class Answer(NamedTuple):
    """What a routed function says of B images; L decisions per image, if there are several.

    Attributes:
        logits: float [B, K].
        scores: float [B, N] or [B, L, N], of all experts.
        indices: int [B, k] or [B, L, k], the experts chosen.
    """

    logits: Array
    scores: Array
    indices: Array


class Routed(NamedTuple):
    """A mixture of experts as functions of images [B, ...], each image alone.

    Calling it gives the logits, so that every other attack takes it too. Functions are
    ``jax.tree_util.Partial`` where their arrays shall be arguments of what is compiled.

    Attributes:
        classify: images -> ``Answer``: the function itself, with its true gradient.
        follow: (images, indices) -> logits [B, K] of the experts named, whatever the router says.
        mix: (images, weights float like the scores) -> logits of all experts at once, each
            expert's output weighed; differentiable in both.
        weigh: scores -> weights like the scores, 0 for experts that are not chosen: what the gate
            gives. ``mix(x, weigh(scores))`` is ``classify(x).logits``, at the cost of all experts.
    """

    classify: Callable[[Array], Answer]
    follow: Callable[[Array, Array], Array]
    mix: Callable[[Array, Array], Array]
    weigh: Callable[[Array], Array]

    def __call__(self, images: Array) -> Array:
        """Images -> logits [B, K]."""
        return self.classify(images).logits


class _Shown(NamedTuple):
    """What one step of an attack looks at: a tree of arrays [B, ...]."""

    logits: Array
    scores: Array
    judge: Array
    chosen: Array  # 1 for the experts of the clean route, like the scores


def route_attack(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Attack:
    """APGD on the router: leave the clean route.

    Maximises, summed over decisions, the margin by which the best expert off the clean route beats
    the worst one on it. The classifier's loss is not looked at, but of all points passed one that
    the network misclassifies is kept. The function attacked must be ``Routed``.

    Raises:
        ValueError: if a setting is not valid; when called, if every expert is always chosen.
    """
    return as_attack(route_steps(threat, num_steps=num_steps, restarts=restarts))


def route_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """``route_attack`` cut into steps."""

    def value(shown: _Shown, labels: Array) -> Array:
        return _summed(_margin(shown.scores, shown.chosen))

    return _judged(threat, _shown, value, num_steps=num_steps, restarts=restarts)


def joint_attack(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Attack:
    """APGD on loss and route at once, as AdvMoE's training attack aims at both.

    Maximises the cross-entropy of the logits plus -log of the probability (softmax of the scores)
    of the clean route's experts, averaged over decisions; both in nats (Zhang et al., ICCV 2023,
    eq. 4, with labels in the place of clean outputs). The function attacked must be ``Routed``.

    Raises:
        ValueError: if a setting is not valid; when called, if every expert is always chosen.
    """
    return as_attack(joint_steps(threat, num_steps=num_steps, restarts=restarts))


def joint_steps(threat: Threat, *, num_steps: int = 100, restarts: int = 1) -> Stepwise:
    """``joint_attack`` cut into steps."""

    def value(shown: _Shown, labels: Array) -> Array:
        log_probs = jax.nn.log_softmax(shown.scores.astype(jnp.float32))
        kept = jax.nn.logsumexp(log_probs, axis=-1, b=shown.chosen)
        decisions = max(kept[0].size, 1)
        return cross_entropy(shown.logits, labels) - _summed(kept) / decisions

    return _judged(threat, _shown, value, num_steps=num_steps, restarts=restarts)


def gate_attack(
    threat: Threat,
    gate: str = "straight_through",
    *,
    loss: str = "cross_entropy",
    num_steps: int = 100,
    restarts: int = 1,
    eot_samples: int = 4,
    noise: float = 0.25,
    temperature: float = 0.5,
) -> Attack:
    """APGD through a gate whose choice has a gradient; see ``through_gate``.

    The gradient is one of a surrogate, averaged over noise in the gate (Athalye et al., ICML
    2018). It may lead where the loss's own does not, and alone it overrates robustness: such
    gradients mask (see README). The network itself judges every point. The function attacked must
    be ``Routed``; a step costs all experts of every layer, ``eot_samples`` times.

    Args:
        threat: the ball and the pixel range.
        gate: ``straight_through``, ``softmax`` or ``hard``.
        loss: of the surrogate's logits and the labels.
        num_steps: as in ``apgd``.
        restarts: as in ``apgd``.
        eot_samples: draws of the noise per step.
        noise: its scale.
        temperature: of the softmax.

    Raises:
        ValueError: if a setting is not valid.
    """
    return as_attack(
        gate_steps(
            threat,
            gate,
            loss=loss,
            num_steps=num_steps,
            restarts=restarts,
            eot_samples=eot_samples,
            noise=noise,
            temperature=temperature,
        )
    )


def gate_steps(
    threat: Threat,
    gate: str = "straight_through",
    *,
    loss: str = "cross_entropy",
    num_steps: int = 100,
    restarts: int = 1,
    eot_samples: int = 4,
    noise: float = 0.25,
    temperature: float = 0.5,
) -> Stepwise:
    """``gate_attack`` cut into steps."""
    if eot_samples < 1:
        raise ValueError(f"eot_samples={eot_samples} must be positive")
    of_logits = make_loss(loss)
    if of_logits.against_clean:
        raise ValueError("gate attacks compare with labels, not with the clean outputs")
    _check_gate(gate, noise, temperature)

    def view(function: Routed, clean: Answer) -> Callable[[Array, Array], _Shown]:
        surrogate = through_gate(function, gate, noise=noise, temperature=temperature)

        def shown(images: Array, keys: Array) -> _Shown:
            answer = function.classify(images)
            return _Shown(
                surrogate(images, keys), answer.scores, answer.logits, jnp.zeros_like(answer.scores)
            )

        return shown

    steps = _judged(
        threat,
        view,
        lambda shown, labels: of_logits.value(shown.logits, labels),
        num_steps=num_steps,
        restarts=restarts,
        eot_samples=eot_samples,
    )
    return steps._replace(needs=CLASSES.get(loss, 2))


def through_gate(
    function: Routed, gate: str, *, noise: float = 0.25, temperature: float = 0.5
) -> Callable[[Array, Array], Array]:
    """The function with another gate: (images, keys [B]) -> logits [B, K].

    The gate sees the scores plus Gumbel noise, so that the routes drawn are those of a softmax
    over the scores (Jang et al., ICLR 2017; Maddison et al., ICLR 2017). ``noise`` and
    ``temperature`` are in units of an image's spread of scores, largest minus smallest: a router
    with large scores hides nothing. The weights of a decision are

    - ``hard``: the function's own at the noisy scores; no gradient reaches the router;
    - ``straight_through``: forward the same; backward the gradient of ``softmax`` (Bengio et al.,
      2013), which knows what the experts that were not chosen would have answered;
    - ``softmax``: softmax(scores / temperature) times what the hard weights add up to, of all
      experts.

    Raises:
        ValueError: if the gate is unknown, the noise negative or the temperature not positive.
    """
    _check_gate(gate, noise, temperature)

    def logits(images: Array, keys: Array) -> Array:
        scores = function.classify(images).scores.astype(jnp.float32)
        span = jnp.max(scores, axis=-1, keepdims=True) - jnp.min(scores, axis=-1, keepdims=True)
        span = lax.stop_gradient(jnp.maximum(span, _LEAST_SPREAD))
        drawn = jax.vmap(lambda k: jax.random.gumbel(k, scores.shape[1:]))(keys)
        scores = scores + noise * span * drawn
        hard = function.weigh(scores)
        soft = jax.nn.softmax(scores / (temperature * span), axis=-1)
        soft = soft * jnp.sum(hard, axis=-1, keepdims=True)
        if gate == "hard":
            weights = hard
        elif gate == "softmax":
            weights = soft
        else:
            weights = soft + lax.stop_gradient(hard - soft)
        return function.mix(images, weights)

    return logits


class Pathways(NamedTuple):
    """What ``worst_pathway`` found of B images, R routes each; the first is the clean one.

    Attributes:
        adversarial: [B, ...] like the images, in the ball and in range: one that the network
            misclassifies if there is one, else one that fools its route, else the clean image.
        fooled: bool [B, R], whether the attack on that route succeeded: the pathway held fixed
            misclassifies an image of the ball.
        network_fooled: bool [B], whether the network itself misclassifies ``adversarial``.
        routes: int32 [B, R, k] or [B, R, L, k], sorted per decision; routes may repeat.
    """

    adversarial: Array
    fooled: Array
    network_fooled: Array
    routes: Array

    @property
    def robust(self) -> Array:
        """bool [B]: the attack failed on every route that was found to be within reach."""
        return ~jnp.any(self.fooled, axis=1)


def worst_pathway(
    threat: Threat,
    *,
    num_steps: int = 50,
    search_steps: int = 20,
    restarts: int = 1,
    frozen: bool = False,
) -> Callable[[Routed, Array, Array, Array], Pathways]:
    """Attacks every pathway that an attacker was found to reach, each held fixed.

    ``worst_pathway(threat)(function, images, labels, key)`` -> ``Pathways``; pure, so it may be
    compiled. In two parts, for the clean route and then for each of the N experts:

    1. search: APGD on the scores heads for a route with that expert in every decision. The route
       of the point found, whichever it is, is one that a perturbation in the ball reaches. (For
       one decision and one choice, that is every reachable route the search is good enough for; of
       the N^L routes of L decisions it is up to N.)
    2. attack: APGD on the cross-entropy of ``function.follow(x, route)``, the route held fixed.

    Attacked and judging function of part 2 are the same fixed pathway. An image counts as robust
    only if part 2 fails on every route; whether the network itself errs on the image found is told
    apart (``network_fooled``).

    Args:
        threat: the ball and the pixel range.
        num_steps: of the attack on a route.
        search_steps: of the search for a route.
        restarts: of the attack on a route.
        frozen: only the clean route: the frozen-route attack, on the experts alone.

    Raises:
        ValueError: if a setting is not valid.
    """
    search = apgd(threat, loss=Loss(_heading, _arrived), num_steps=search_steps)
    attack = apgd(threat, num_steps=num_steps, restarts=restarts)

    def run(function: Routed, images: Array, labels: Array, key: Array) -> Pathways:
        keys = per_image_keys(key, images.shape[0])
        labels = jnp.asarray(labels, jnp.int32)
        clean = function.classify(images)
        clean_route = jnp.sort(clean.indices, axis=-1).astype(jnp.int32)

        def one(route: Array, round_keys: Array) -> tuple[Array, Array, Array, Array]:
            def held(x: Array) -> Array:
                return function.follow(x, route)

            found = attack(held, images, labels, round_keys)
            fooled = jnp.argmax(held(found), axis=-1) != labels
            network = jnp.argmax(function.classify(found).logits, axis=-1) != labels
            return found, fooled, network, route

        def towards(expert: Array) -> tuple[Array, Array, Array, Array]:
            round_keys = fold_in(keys, expert + 1)
            wanted = jnp.zeros_like(labels) + expert
            reached = search(
                lambda x: function.classify(x).scores, images, wanted, fold_in(round_keys, 0)
            )
            route = jnp.sort(function.classify(reached).indices, axis=-1).astype(jnp.int32)
            return one(route, fold_in(round_keys, 1))

        first = jax.tree.map(lambda a: a[None], one(clean_route, fold_in(keys, 0)))
        rounds = first
        if not frozen:
            experts = jnp.arange(clean.scores.shape[-1], dtype=jnp.int32)
            others = lax.map(towards, experts)
            rounds = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, others)
        found, fooled, network, routes = rounds
        # Fooling the network is worth more than fooling a pathway; of equals the first.
        worth = 2 * network.astype(jnp.int32) + fooled
        at = jnp.argmax(worth, axis=0)
        best = jnp.max(worth, axis=0)
        chosen = jnp.take_along_axis(found, at.reshape(1, -1, *[1] * (images.ndim - 1)), 0)[0]
        return Pathways(
            lax.stop_gradient(select(best > 0, chosen, images)),
            fooled.T,
            best >= 2,
            jnp.moveaxis(routes, 0, 1),
        )

    return run


def _heading(scores: Array, wanted: Array) -> Array:
    """By how much the wanted expert beats the best other one, summed over decisions; float [B]."""
    flags = jax.nn.one_hot(wanted, scores.shape[-1])
    flags = flags.reshape(flags.shape[0], *[1] * (scores.ndim - 2), -1)
    return -_summed(_margin(scores, jnp.broadcast_to(flags, scores.shape)))


def _arrived(scores: Array, wanted: Array) -> Array:
    best = jnp.argmax(scores, axis=-1)
    there = best == wanted.reshape(-1, *[1] * (best.ndim - 1))
    return jnp.all(there.reshape(len(there), -1), axis=-1)


def _judged(
    threat: Threat,
    view: Callable[[Routed, Answer], Callable[..., _Shown]],
    value: Callable[[_Shown, Array], Array],
    **settings: Any,
) -> Stepwise:
    """APGD on ``value`` of what ``view`` shows; a point counts when the network itself errs."""

    def fooled(shown: _Shown, labels: Array) -> Array:
        return jnp.argmax(shown.judge, axis=-1) != labels

    inner = apgd_steps(threat, loss=Loss(value, fooled), **settings)

    def step(function: Routed, batch: Any, state: Any) -> Any:
        return inner.step(view(function, batch.clean), batch, state)

    return inner._replace(step=step, look=lambda function, images: function.classify(images))


def _shown(function: Routed, clean: Answer) -> Callable[[Array], _Shown]:
    num_experts, k = clean.scores.shape[-1], clean.indices.shape[-1]
    if k == num_experts:
        raise ValueError(
            f"every one of the {num_experts} experts is always chosen: there is no route to change"
        )
    chosen = jnp.sum(jax.nn.one_hot(clean.indices, num_experts), axis=-2)

    def shown(images: Array) -> _Shown:
        answer = function.classify(images)
        return _Shown(answer.logits, answer.scores, answer.logits, chosen)

    return shown


def _margin(scores: Array, chosen: Array) -> Array:
    """Best score off the route minus the worst on it, float32 [B] or [B, L]."""
    scores = scores.astype(jnp.float32)
    off = jnp.max(jnp.where(chosen > 0, -jnp.inf, scores), axis=-1)
    return off - jnp.min(jnp.where(chosen > 0, scores, jnp.inf), axis=-1)


def _summed(values: Array) -> Array:
    return jnp.sum(values.reshape(values.shape[0], -1), axis=-1)


def _check_gate(gate: str, noise: float, temperature: float) -> None:
    if gate not in GATES:
        raise ValueError(f"gate {gate!r} is unknown; choose one of {', '.join(GATES)}")
    if noise < 0 or not temperature > 0:
        raise ValueError(f"noise={noise} must be at least 0, temperature={temperature} positive")
