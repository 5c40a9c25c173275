"""The attack on every pathway within reach: each held fixed, each its own judge.

``routed`` says how it stands to the other attacks on a mixture of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from advmoe_jax.attacks.admissible import check_images, check_labels
from advmoe_jax.attacks.apgd import apgd
from advmoe_jax.attacks.constraints import AnyImages, Threat
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.losses import Loss
from advmoe_jax.attacks.pgd import per_image_keys
from advmoe_jax.attacks.routed import Chosen, Routed, Scores, answer_to, margin_off
from advmoe_jax.attacks.stepwise import select
from advmoe_jax.types import Array


class Pathways(NamedTuple):
    """What ``worst_pathway`` found on each of some routes; the first is the clean one.

    Attributes:
        adversarial: like the images, in the ball and in range: one that the network
            misclassifies if there is one, else one that fools its route, else the clean image.
        fooled: whether the attack on that route succeeded: the pathway held fixed misclassifies an
            image of the ball.
        network_fooled: whether the network itself misclassifies ``adversarial``.
        routes: int32, sorted per decision; routes may repeat.
    """

    adversarial: AnyImages
    fooled: Bool[Array, "batch routes"]
    network_fooled: Bool[Array, " batch"]
    routes: Int[Array, "batch routes decisions k"]

    @property
    def robust(self) -> Bool[Array, " batch"]:
        """The attack failed on every route that was found to be within reach."""
        return ~jnp.any(self.fooled, axis=1)


def worst_pathway(
    threat: Threat,
    *,
    num_steps: int = 50,
    search_steps: int = 20,
    restarts: int = 1,
    frozen: bool = False,
    samples: int = 0,
) -> Callable[[Routed, Array, Array, Array], Pathways]:
    """Attacks every pathway that an attacker was found to reach, each held fixed.

    ``worst_pathway(threat)(function, images, labels, key)`` -> ``Pathways``; pure, so it may be
    compiled. In two parts, for the clean route and then for each of the N experts:

    1. search: APGD on the scores heads for a route with that expert in every decision. The route
       of the point found, whichever it is, is one that a perturbation in the ball reaches. (For
       one decision and one choice, that is every reachable route the search is good enough for; of
       the N^L routes of L decisions it is up to N, and ``samples`` more, for which the expert to
       head for is drawn anew for every decision.)
    2. attack: APGD on the cross-entropy of ``function.follow(x, route)``, the route held fixed.

    Attacked and judging function of part 2 are the same fixed pathway. An image counts as robust
    only if part 2 fails on every route; whether the network itself errs on the image found is told
    apart (``network_fooled``).

    The share of robust images is hence a lower bound of the robust accuracy for an attacker who may
    choose among *these* routes, whatever the router says; for one who may choose among all it is an
    upper bound, since a sample of routes misses some.

    Args:
        threat: the ball and the pixel range.
        num_steps: of the attack on a route.
        search_steps: of the search for a route.
        restarts: of the attack on a route.
        frozen: only the clean route: the frozen-route attack, on the experts alone.
        samples: routes to search for besides those of one expert in every decision.

    Raises:
        ValueError: if a setting is not valid.
    """
    if samples < 0:
        raise ValueError(f"samples={samples} must not be negative")
    search = apgd(threat, loss=Loss(_heading, _arrived), num_steps=search_steps)
    attack = apgd(threat, num_steps=num_steps, restarts=restarts)

    def run(function: Routed, images: Array, labels: Array, key: Array) -> Pathways:
        check_images(threat, images)
        check_labels(images, labels)
        keys = per_image_keys(key, images.shape[0])
        labels = jnp.asarray(labels, jnp.int32)
        clean = answer_to(function, images)
        clean_route = jnp.sort(clean.indices, axis=-1).astype(jnp.int32)

        def one(route: Chosen, round_keys: Array) -> tuple[Array, Array, Array, Array]:
            def held(x: Array) -> Array:
                return function.follow(x, route)

            found = attack(held, images, labels, round_keys)
            fooled = jnp.argmax(held(found), axis=-1) != labels
            network = jnp.argmax(function.classify(found).logits, axis=-1) != labels
            return found, fooled, network, route

        num_experts, decisions = clean.scores.shape[-1], clean.scores.shape[1]

        def towards(number: Array) -> tuple[Array, Array, Array, Array]:
            round_keys = fold_in(keys, number + 1)
            wanted = jnp.zeros((len(labels), decisions), jnp.int32) + number
            if samples:

                def drawn(key: Array) -> Array:
                    return jax.random.randint(key, (decisions,), 0, num_experts)

                sampled = jax.vmap(drawn)(fold_in(round_keys, 2))
                wanted = jnp.where(number < num_experts, wanted, sampled)
            reached = search(
                lambda x: function.classify(x).scores, images, wanted, fold_in(round_keys, 0)
            )
            route = jnp.sort(function.classify(reached).indices, axis=-1).astype(jnp.int32)
            return one(route, fold_in(round_keys, 1))

        first = jax.tree.map(lambda a: a[None], one(clean_route, fold_in(keys, 0)))
        rounds = first
        if not frozen:
            others = lax.map(towards, jnp.arange(num_experts + samples, dtype=jnp.int32))
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


Wanted = Int[Array, "batch decisions"]


def _heading(scores: Scores, wanted: Wanted) -> Float[Array, " batch"]:
    """By how much the wanted experts beat the best other ones, summed over decisions."""
    return -jnp.sum(margin_off(scores, jax.nn.one_hot(wanted, scores.shape[-1])), axis=-1)


def _arrived(scores: Scores, wanted: Wanted) -> Bool[Array, " batch"]:
    return jnp.all(jnp.argmax(scores, axis=-1) == wanted, axis=-1)
