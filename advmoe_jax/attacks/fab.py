"""FAB: small perturbations by steps to the linearised decision boundary.

Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack",
ICML 2020, algorithm 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from advmoe_jax.attacks.constraints import Threat, diameter, distance, steepest, uniform_start
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.hyperplane import step_to_hyperplane
from advmoe_jax.attacks.loops import repeat
from advmoe_jax.attacks.losses import check_outputs
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import Batch, Stepwise, as_attack, logit_gap, select
from advmoe_jax.types import Array


class State(NamedTuple):
    """Where an image stands; every array has B rows. The first four as in ``stepwise.State``.

    ``images`` is the current point; ``score`` is minus the distance of the nearest adversarial
    image found, which ``adversarial`` holds if it is in the ball.
    """

    count: Array
    fooled: Array
    score: Array
    adversarial: Array
    images: Array


def fab(
    threat: Threat,
    *,
    num_steps: int = 100,
    targeted: bool = False,
    num_targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Attack:
    """FAB; the result is the nearest adversarial image found in the ball, or the clean image.

    Args:
        threat: linf, l2 or l1; the radius decides what is returned and where restarts begin, not
            the search (an infinite one returns whatever is found).
        num_steps: steps of a run.
        targeted: heads for the boundary to one class at a time, the ``num_targets`` most likely
            wrong ones on the clean image; one gradient a step instead of one per class.
        num_targets: only used when targeted.
        restarts: runs (per target); the first from the clean image, the others from a point in
            the ball of half the radius.
        alpha_max: largest weight of the step from the clean image.
        eta: how far beyond the boundary a step goes, 1 is onto it.
        beta: what is left of a perturbation after it has been found adversarial.

    Raises:
        ValueError: if a setting is not valid; when called, if the function has too few classes.
    """
    return as_attack(
        threat,
        fab_steps(
            threat,
            num_steps=num_steps,
            targeted=targeted,
            num_targets=num_targets,
            restarts=restarts,
            alpha_max=alpha_max,
            eta=eta,
            beta=beta,
        ),
    )


def fab_steps(
    threat: Threat,
    *,
    num_steps: int = 100,
    targeted: bool = False,
    num_targets: int = 9,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Stepwise:
    """``fab`` cut into steps."""
    if num_steps < 1 or restarts < 1 or num_targets < 1:
        raise ValueError(
            f"num_steps={num_steps}, restarts={restarts} and num_targets={num_targets} must be "
            "positive"
        )
    if not (0 <= alpha_max <= 1 and eta >= 1 and 0 <= beta <= 1):
        raise ValueError(
            f"alpha_max={alpha_max} and beta={beta} must be in [0, 1], eta={eta} at least 1"
        )

    def begin(batch: Batch) -> State:
        clean = batch.images
        again = batch.restart > 0
        radius = jnp.minimum(threat.epsilon, diameter(threat, clean.shape[1:]))
        half = threat._replace(epsilon=radius / 2)
        drawn = uniform_start(half, clean, fold_in(batch.keys, 0)) if restarts > 1 else clean
        zeros = jnp.zeros_like(clean, jnp.float32, shape=clean.shape[:1])
        return State(
            count=zeros.astype(jnp.int32),
            fooled=zeros.astype(bool),
            score=zeros - jnp.inf,
            adversarial=clean,
            images=select(again, drawn, clean),
        )

    def step(function: Callable[[Array], Array], batch: Batch, state: State) -> State:
        wanted = batch.wanted if targeted else None
        gap, normal = _boundary(threat, function, state.images, batch.labels, wanted)
        moved = _approach(threat, batch.images, state.images, gap, normal, alpha_max, eta)
        logits = function(moved)
        wrong = jnp.argmax(logits, axis=-1) != batch.labels
        far = distance(threat, moved, batch.images)
        nearer = wrong & (-far > state.score)
        inside = nearer & (far <= threat.epsilon)
        back = batch.images + beta * (moved - batch.images)
        return State(
            count=state.count + 1,
            fooled=state.fooled | inside,
            score=jnp.where(nearer, -far, state.score),
            adversarial=select(inside, moved, state.adversarial),
            images=select(wrong, back, moved),
        )

    return Stepwise(
        begin,
        step,
        num_steps,
        restarts,
        num_targets if targeted else 0,
        identity=("fab", targeted, alpha_max, eta, beta),
        is_boundless=True,
    )


def _approach(
    threat: Threat,
    clean: Array,
    images: Array,
    gap: Array,
    normal: Array,
    alpha_max: float,
    eta: float,
) -> Array:
    """Beyond the boundary, between the ways there from the image and from the clean one (eq. 9)."""
    flat = (clean.shape[0], -1)
    start, origin, w = (a.reshape(flat) for a in (images, clean, normal))
    # The hyperplane is given by what is missing at the image.
    gaps = gap, gap + jnp.sum(w * (start - origin), axis=1)
    steps = [
        step_to_hyperplane(threat.norm, p, w, g, threat.lower, threat.upper)
        for p, g in zip((start, origin), gaps, strict=True)
    ]
    far = [jnp.maximum(distance(threat, s, jnp.zeros_like(s)), 1e-8) for s in steps]
    alpha = jnp.minimum(far[0] / (far[0] + far[1]), alpha_max)[:, None]
    moved = (start + eta * steps[0]) * (1 - alpha) + (origin + eta * steps[1]) * alpha
    return jnp.clip(moved, threat.lower, threat.upper).reshape(clean.shape).astype(clean.dtype)


def _boundary(
    threat: Threat,
    function: Callable[[Array], Array],
    images: Array,
    labels: Array,
    wanted: Array | None,
) -> tuple[Array, Array]:
    """How much ``z_c - z_label`` must grow, [B], and its gradient; c is wanted, or the nearest."""
    logits, pull = jax.vjp(function, images)
    check_outputs(logits, labels, 2)
    rows = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)

    def towards(classes: Array) -> tuple[Array, Array, Array]:
        direction = jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype) - rows
        gradient = pull(direction)[0]
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0)
        gap = logit_gap(logits, labels, classes)
        # A class of logit -inf has no boundary: there is nowhere to go.
        return jnp.where(jnp.isfinite(gap), gap, 0), gradient, jnp.isfinite(gap)

    if wanted is not None:
        return towards(wanted)[:2]

    def compare(c: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        gap, gradient, is_there = towards(jnp.full_like(labels, c))
        # Of the linear map, the distance in the dual norm: along the steepest unit step.
        slope = jnp.sum(gradient * steepest(threat, gradient), axis=tuple(range(1, images.ndim)))
        far = jnp.abs(gap) / (slope + 1e-12)
        far = jnp.where((labels == c) | ~is_there, jnp.inf, far)
        return select(far < best[0], (far, gap, gradient), best)

    none = jnp.full_like(images, jnp.inf, jnp.float32, images.shape[:1])
    start = none, jnp.zeros_like(none), jnp.zeros_like(images)
    return repeat(logits.shape[-1], compare, start)[1:]
