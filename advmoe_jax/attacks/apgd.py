"""APGD: projected gradient ascent that finds its own step size.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, algorithm 1; in l1 Croce and Hein, "Mind the box: l1-APGD for
sparse adversarial attacks on image classifiers", ICML 2021.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.constraints import Threat, project, steepest, uniform_start
from advmoe_jax.attacks.expectation import fold_in, loss_and_gradient
from advmoe_jax.attacks.losses import TARGETED_LOSSES, Loss, make_loss, name_of, targeted
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.schedule import Timetable, should_halve, sparsify, timetable
from advmoe_jax.attacks.stepwise import Batch, Stepwise, as_attack, is_better, select
from advmoe_jax.types import Array

MOMENTUM = 0.75
# Losses without a meaning for fewer classes: their scale looks at the third or fourth logit.
CLASSES = {"dlr": 3, "dlr_targeted": 4}


class State(NamedTuple):
    """Where an image stands; every array has B rows. The first four as in ``stepwise.State``.

    ``images`` is the point to look at next, ``previous`` the one before it; ``best`` the point of
    highest loss with its gradient; ``raised`` counts since the last checkpoint; ``density`` (the
    share of pixels a step moves) and ``changed`` are l1's; ``flat``: no gradient at the start.
    """

    count: Array
    fooled: Array
    score: Array
    adversarial: Array
    images: Array
    previous: Array
    loss: Array
    step_size: Array
    best: Array
    best_gradient: Array
    best_loss: Array
    raised: Array
    best_loss_before: Array
    halved: Array
    density: Array
    changed: Array
    flat: Array


def apgd(
    threat: Threat,
    *,
    loss: str | Loss = "cross_entropy",
    num_steps: int = 100,
    restarts: int = 1,
    num_targets: int = 9,
    targeted: bool = False,
    start: str = "uniform",
    shrinking: bool = False,
    eot_samples: int = 0,
) -> Attack:
    """APGD; the result is the image of highest loss that is misclassified, if any is.

    Args:
        threat: linf, l2 or l1, and the pixel range.
        loss: ``cross_entropy`` (or ``ce``), ``dlr``, ``margin``, a ``Loss``; or ``dlr_targeted``,
            ``margin_targeted``, ``ce_targeted``: runs towards the ``num_targets`` most likely
            wrong classes on the clean image, one after the other, and any error counts.
        num_steps: gradient steps of a run; it computes one gradient more.
        restarts: runs (per target) from independent starts.
        num_targets: only used by the targeted losses.
        targeted: the labels given are classes to reach instead of classes to leave; not with
            the targeted losses, which choose the classes themselves.
        start: ``uniform`` in the ball, or ``none``, the clean image.
        shrinking: in l1: begins in a ball of three times the radius, goes on in one of twice the
            radius from the best point there, and ends in the ball itself, with 30, 30 and 40% of
            the steps (as the code of Croce and Hein, ICML 2021; AutoAttack's way in l1).
        eot_samples: not 0: the function is randomised, ``function(images, keys)`` with a key per
            image, and each step averages over that many draws.

    Raises:
        ValueError: if a setting is not valid; when called, if the function has too few classes.
    """
    steps = apgd_steps(
        threat,
        loss=loss,
        num_steps=num_steps,
        restarts=restarts,
        num_targets=num_targets,
        aimed=targeted,
        start=start,
        shrinking=shrinking,
        eot_samples=eot_samples,
    )
    return as_attack(threat, steps)


def apgd_steps(
    threat: Threat,
    *,
    loss: str | Loss = "cross_entropy",
    num_steps: int = 100,
    restarts: int = 1,
    num_targets: int = 9,
    aimed: bool = False,
    start: str = "uniform",
    shrinking: bool = False,
    eot_samples: int = 0,
) -> Stepwise:
    """``apgd`` cut into steps; ``aimed`` is its ``targeted``."""
    if start not in ("uniform", "none"):
        raise ValueError(f"start {start!r} is unknown; choose one of uniform, none")
    if num_steps < 1 or restarts < 1 or num_targets < 1 or eot_samples < 0:
        raise ValueError(
            f"num_steps={num_steps}, restarts={restarts} and num_targets={num_targets} must be "
            f"positive, eot_samples={eot_samples} at least 0"
        )
    if shrinking and threat.norm != "l1":
        raise ValueError(f"shrinking balls are defined for l1, not for {threat.norm}")
    chooses = isinstance(loss, str) and loss in TARGETED_LOSSES
    if chooses and aimed:
        raise ValueError(f"loss {loss!r} chooses its targets itself: leave targeted=False")
    needs = CLASSES.get(loss, 2) if isinstance(loss, str) else 2
    if isinstance(loss, str):
        loss = TARGETED_LOSSES[loss] if chooses else make_loss(loss)
    if loss.against_clean:
        raise ValueError("APGD compares with labels, not with the clean outputs: use pgd")
    loss = targeted(loss) if aimed else loss
    sparse = threat.norm == "l1"
    plan = timetable(num_steps, sparse=sparse, shrinking=shrinking)
    adapt, move = (_adapt_sparsity, _move_sparsely) if sparse else (_adapt, _move)
    identity = "apgd", name_of(loss), aimed, start, shrinking

    def begin(batch: Batch) -> State:
        clean, keys = batch.images, fold_in(batch.keys, 0)
        ball = threat._replace(epsilon=threat.epsilon * 3) if shrinking else threat
        first = clean if start == "none" else uniform_start(ball, clean, keys)
        state = _begin(ball, clean, first)
        return _sparse_as_it_is(clean, state) if shrinking else state

    def step(function: Any, batch: Batch, state: State) -> State:
        """Looks at the current point, then moves on."""
        found = loss_and_gradient(
            function,
            loss,
            state.images,
            (batch.labels, batch.wanted) if chooses else batch.labels,
            fold_in(batch.keys, state.count + 1),
            eot_samples,
        )
        now = plan.at(state.count)
        state = _look(state, found[0], found[1] & (now.radius == 1), found[2], now.step == 0)
        ball = _ball(threat, now.radius, batch.images) if shrinking else threat
        state, gradient = adapt(ball, batch.images, state, found[2], now.window)
        moved = move(ball, batch.images, state, gradient)
        state = state._replace(images=moved, previous=state.images, count=state.count + 1)
        return _shrink(threat, batch.images, state, now, plan) if shrinking else state

    return Stepwise(
        begin,
        step,
        len(plan.step),
        restarts,
        num_targets if chooses else 0,
        eot_samples,
        needs,
        identity=identity,
    )


def _shrink(threat: Threat, clean: Array, state: State, now: Timetable, plan: Timetable) -> State:
    """Where a ball's steps are done, the best point goes on in the next one, as if it began."""
    radius = plan.at(state.count).radius
    start = project(_ball(threat, radius, clean), state.best, clean)
    fresh = state._replace(images=start, step_size=threat.epsilon * radius)
    return select(now.is_last, _sparse_as_it_is(clean, fresh), state)


def _ball(threat: Threat, radius: Array, images: Array) -> Threat:
    """The ball around each image, its radius in units of the threat's."""
    return threat._replace(epsilon=threat.epsilon * _like(radius, images))


def _sparse_as_it_is(clean: Array, state: State) -> State:
    """The state whose next steps move as many pixels as have been moved, or fewer."""
    changed = _changed(state.images, clean)
    return state._replace(changed=changed, density=changed / clean[0].size / 1.5)


def _changed(images: Array, clean: Array) -> Array:
    """How many pixels differ, float32 [B]."""
    return jnp.sum(images != clean, axis=tuple(range(1, clean.ndim))).astype(jnp.float32)


def _begin(threat: Threat, clean: Array, first: Array) -> State:
    # Made like the images, so that they vary over the same mesh axes inside a shard_map.
    zeros = jnp.zeros_like(clean, jnp.float32, shape=clean.shape[:1])
    length = threat.epsilon if threat.norm == "l1" else 2.0 * threat.epsilon
    none, never = zeros.astype(jnp.int32), zeros.astype(bool)
    size = clean[0].size
    return State(
        count=none,
        fooled=never,
        score=zeros - jnp.inf,
        adversarial=clean,
        images=first,
        previous=first,
        loss=zeros,
        step_size=zeros + length,
        best=first,
        best_gradient=jnp.zeros_like(clean),
        best_loss=zeros - jnp.inf,
        raised=none,
        best_loss_before=zeros - jnp.inf,
        halved=never,
        density=zeros + 0.2,
        changed=zeros + size,
        flat=never,
    )


def _look(state: State, value: Array, fooled: Array, gradient: Array, first: Array) -> State:
    """The state after the loss at the current point is known, ``first`` where it is a start."""
    higher = first | (value > state.best_loss)
    result = first | is_better(fooled, value, state.fooled, state.score)
    axes = tuple(range(1, gradient.ndim))
    return state._replace(
        fooled=state.fooled | fooled,
        score=jnp.where(result, value, state.score),
        adversarial=select(result, state.images, state.adversarial),
        raised=state.raised + (~first & (value > state.loss)),
        loss=value,
        best=select(higher, state.images, state.best),
        best_gradient=select(higher, gradient, state.best_gradient),
        best_loss=jnp.where(higher, value, state.best_loss),
        best_loss_before=jnp.where(first, value, state.best_loss_before),
        flat=state.flat | (first & ~jnp.any(gradient != 0, axis=axes)),
    )


def _adapt(
    threat: Threat, clean: Array, state: State, gradient: Array, window: Array
) -> tuple[State, Array]:
    """Halves the step and returns to the best point, where that is due."""
    due = window > 0
    halve = should_halve(
        state.raised, window, state.halved, state.best_loss_before, state.best_loss
    )
    adapted = state._replace(
        images=select(halve, state.best, state.images),
        loss=jnp.where(halve, state.best_loss, state.loss),
        step_size=jnp.where(halve, state.step_size / 2, state.step_size),
        raised=jnp.where(due, 0, state.raised),
        best_loss_before=jnp.where(due, state.best_loss, state.best_loss_before),
        halved=jnp.where(due, halve, state.halved),
    )
    # What comes next is measured from here: the momentum is the way to this point.
    return adapted, select(halve, state.best_gradient, gradient)


def _move(threat: Threat, clean: Array, state: State, gradient: Array) -> Array:
    """One projected step with momentum (eq. 1)."""
    images, step = state.images, _like(state.step_size, clean)
    ahead = project(threat, images + step * steepest(threat, gradient), clean)
    share = _like(jnp.where(state.count == 0, 1.0, MOMENTUM), clean)
    moved = images + share * (ahead - images) + (1 - share) * (images - state.previous)
    return project(threat, moved, clean)


def _adapt_sparsity(
    threat: Threat, clean: Array, state: State, gradient: Array, window: Array
) -> tuple[State, Array]:
    due, changed = window > 0, _changed(state.best, clean)
    largest = jnp.reshape(threat.epsilon, -1)
    density, step, again = sparsify(changed, state.changed, clean[0].size, state.step_size, largest)
    again = due & again
    adapted = state._replace(
        images=select(again, state.best, state.images),
        step_size=jnp.where(due, step, state.step_size),
        density=jnp.where(due, density, state.density),
        changed=jnp.where(due, changed, state.changed),
    )
    return adapted, select(again, state.best_gradient, gradient)


def _move_sparsely(threat: Threat, clean: Array, state: State, gradient: Array) -> Array:
    """A step of the largest entries of the gradient, all by the same amount."""
    size = jnp.abs(gradient).astype(jnp.float32)
    wanted = jnp.maximum(jnp.floor(state.density * clean[0].size), 1)
    kept = jnp.sign(gradient) * (size >= _like(_exceeded_by(size, wanted), size))
    entries = jnp.sum(jnp.abs(kept), axis=tuple(range(1, clean.ndim)))
    length = _like(state.step_size / jnp.maximum(entries, 1), clean)
    return project(threat, state.images + length * kept, clean)


def _exceeded_by(size: Array, number: Array) -> Array:
    """A threshold per image that the ``number`` largest entries reach, and few others; float [B].

    By bisection: sorting is slow on some backends.
    """
    axes = tuple(range(1, size.ndim))

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (bounds[0] + bounds[1]) / 2
        enough = jnp.sum(size >= _like(middle, size), axis=axes) >= number
        return jnp.where(enough, middle, bounds[0]), jnp.where(enough, bounds[1], middle)

    largest = jnp.max(size, axis=axes)
    return lax.fori_loop(0, 24, halve, (jnp.zeros_like(largest), largest))[0]


def _like(values: Array, images: Array) -> Array:
    return values.reshape(values.shape + (1,) * (images.ndim - 1)).astype(images.dtype)
