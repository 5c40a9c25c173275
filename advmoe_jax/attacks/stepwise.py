"""Attacks cut into steps, so that a batch can be re-packed while they run.

Every leaf of a state has the image as its first axis and every image counts its own steps: images
at different steps may share a batch, and the outcome does not depend on who shared it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks.admissible import check_images, check_labels
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.expectation import fold_in, mean_outputs
from advmoe_jax.attacks.loops import repeat
from advmoe_jax.attacks.losses import check_outputs
from advmoe_jax.attacks.pgd import Attack, per_image_keys
from advmoe_jax.types import Array


class Batch(NamedTuple):
    """What an attack is told of B images; all arrays have B rows.

    Attributes:
        images: float [B, ...], clean.
        labels: int [B].
        wanted: int [B], the class to head for; only targeted attacks look at it.
        restart: int [B], how many independent tries came before.
        keys: PRNG keys [B], for this round alone.
        clean: what ``Stepwise.look`` saw of the clean images; None if the attack does not look.
    """

    images: Array
    labels: Array
    wanted: Array
    restart: Array
    keys: Array
    clean: Any = None


class State(Protocol):
    """What every attack's state has; a NamedTuple of arrays with B rows.

    Attributes:
        count: int32 [B], steps done.
        fooled: bool [B], whether the attack has reached its aim within the threat model.
        score: float32 [B], what decides between two results that are both fooled, or neither.
        adversarial: float [B, ...], the result so far.
    """

    count: Array
    fooled: Array
    score: Array
    adversarial: Array


class Stepwise(NamedTuple):
    """An attack as a start and a step.

    Attributes:
        begin: batch -> state; does not call the function.
        step: (function, batch, state) -> state.
        num_steps: steps of one round.
        restarts: independent rounds per target.
        num_targets: classes to head for, one after the other, most likely first; 0: untargeted.
        eot_samples: draws of the function's noise; 0 for a function without any.
        needs: the fewest classes its loss is defined for.
        look: (function, images) -> what the steps must know of the clean images, a tree of arrays
            with B rows; computed once per call of the device.
        identity: all settings, for who goes on with an attack that has begun; with a ``repr``.
        is_boundless: its ball may be infinite.
    """

    begin: Callable[[Batch], Any]
    step: Callable[[Callable[..., Any], Batch, Any], Any]
    num_steps: int
    restarts: int = 1
    num_targets: int = 0
    eot_samples: int = 0
    needs: int = 2
    look: Callable[[Callable[..., Any], Array], Any] | None = None
    identity: tuple[Any, ...] = ()
    is_boundless: bool = False

    @property
    def rounds(self) -> int:
        """Rounds an image goes through unless it is fooled before."""
        return self.restarts * max(self.num_targets, 1)


def advance(
    steps: Stepwise,
    function: Callable[..., Any],
    batch: Batch,
    state: Any,
    num_steps: int,
) -> Any:
    """Up to ``num_steps`` more steps; an image that is fooled or through stays as it is."""

    def step(_: Array, state: Any) -> Any:
        stopped = state.fooled | (state.count >= steps.num_steps)
        return select(stopped, state, steps.step(function, batch, state))

    return repeat(num_steps, step, state)


def as_attack(threat: Threat, steps: Stepwise) -> Attack:
    """All rounds, all steps; the best result per image: fooled first, then the higher score."""

    def attack(
        function: Callable[..., Any],
        images: Array,
        labels: Array,
        key: Array,
        clean_outputs: Any = None,
    ) -> Array:
        check_images(threat, images, is_boundless=steps.is_boundless)
        check_labels(images, labels)
        keys = per_image_keys(key, images.shape[0])
        labels = jnp.asarray(labels, jnp.int32)
        ranked = labels[:, None]
        if steps.num_targets:
            if clean_outputs is None:
                clean_outputs = mean_outputs(function, images, keys, steps.eot_samples)
            ranked = likely_wrong(clean_outputs, labels)
            check_classes(steps, ranked.shape[1] + 1)
        clean = steps.look(function, images) if steps.look else None

        def run(i: int | Array) -> Any:
            wanted = lax.dynamic_index_in_dim(ranked, i // steps.restarts, 1, keepdims=False)
            restart = jnp.full_like(labels, i % steps.restarts)
            batch = Batch(images, labels, wanted, restart, fold_in(keys, i), clean)
            state = steps.begin(batch)
            return repeat(steps.num_steps, lambda _, s: steps.step(function, batch, s), state)

        if steps.rounds == 1:
            return lax.stop_gradient(run(0).adversarial)

        def compare(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            state = run(i)
            found = state.adversarial, state.score, state.fooled
            better = is_better(found[2], found[1], best[2], best[1])
            return select(better, found, best)

        worst = jnp.full_like(images, -jnp.inf, jnp.float32, images.shape[:1])
        none_yet = images, worst, jnp.zeros_like(worst, bool)
        return lax.stop_gradient(repeat(steps.rounds, compare, none_yet)[0])

    return attack


def is_better(fooled: Array, score: Array, old_fooled: Array, old_score: Array) -> Array:
    """Fooled beats not fooled, then the higher score wins; bool [B]."""
    return (fooled & ~old_fooled) | ((fooled == old_fooled) & (score > old_score))


def likely_wrong(logits: Array, labels: Array) -> Array:
    """The wrong classes, most likely first, int32 [B, K - 1]."""
    check_outputs(logits, labels, 2)
    right = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    order = jnp.argsort(jnp.where(right, jnp.inf, -logits.astype(jnp.float32)), axis=-1)
    return order[:, :-1].astype(jnp.int32)


def logit_gap(logits: Array, labels: Array, others: Array) -> Array:
    """The label's logit minus the other class's, float32 [B]; inf where that class has -inf."""
    both = jnp.stack([labels, others], axis=1)
    right, other = jnp.take_along_axis(logits.astype(jnp.float32), both, axis=-1).T
    return right - other


def check_classes(steps: Stepwise, num_classes: int) -> None:
    """Raises ValueError unless the attack's loss and targets exist with so many classes."""
    if num_classes < steps.needs:
        raise ValueError(
            f"this loss needs {steps.needs} classes, the function has {num_classes}: "
            "choose cross_entropy or margin"
        )
    if steps.num_targets > num_classes - 1:
        raise ValueError(
            f"num_targets={steps.num_targets}, but {num_classes} classes leave "
            f"{num_classes - 1} wrong ones: give at most {num_classes - 1}"
        )


def select(flags: Array, chosen: Any, other: Any) -> Any:
    """Per image ``chosen`` where the flag is set, else ``other``; trees of arrays with B rows."""

    def one(a: Array, b: Array) -> Array:
        return jnp.where(flags.reshape(flags.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(one, chosen, other)
