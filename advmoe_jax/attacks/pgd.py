"""Projected gradient ascent; FGSM, PGD, momentum PGD and TRADES' attack are settings of one loop.

An attack knows no model. It takes a function from images to outputs and returns images::

    attack = pgd(linf(8 / 255), num_steps=20, step_size=2 / 255)
    adversarial = attack(logits_fn, images, labels, key)

Attacks are pure: they run under ``jit``, ``vmap``, ``shard_map`` and ``pmap``. The attacked
function must treat every image alone (a network in inference mode does).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from advmoe_jax.attacks.admissible import check_images, check_labels
from advmoe_jax.attacks.constraints import (
    AnyImages,
    Threat,
    gaussian_start,
    project,
    signs_start,
    steepest,
    uniform_start,
)
from advmoe_jax.attacks.expectation import fold_in, loss_and_gradient, mean_outputs
from advmoe_jax.attacks.loops import repeat
from advmoe_jax.attacks.losses import Loss, make_loss, takes_labels
from advmoe_jax.attacks.losses import targeted as aimed_at
from advmoe_jax.types import Array, Labels

# (threat, images, keys [B]) -> where a run begins, like the images.
Start = Callable[[Threat, AnyImages, Array], AnyImages]
# The number of a step, from 0, int32 -> its size.
Schedule = Callable[[Array], float | Array]
# Each takes ``start_scale``.
STARTS: dict[str, Callable[[float | Array], Start]] = {
    "none": lambda scale: lambda threat, images, keys: images,
    "uniform": lambda scale: uniform_start,
    "gaussian": lambda scale: partial(gaussian_start, scale=scale),
    "signs": lambda scale: partial(signs_start, scale=scale),
}


class Attack(Protocol):
    """(function, images, labels, key) -> adversarial images."""

    def __call__(
        self,
        function: Callable[[AnyImages], Any],
        images: AnyImages,
        labels: Labels | None,
        key: Array | int,
        clean_outputs: Any = None,
    ) -> AnyImages:
        """Perturbs ``images`` within the threat model.

        Args:
            function: images -> outputs [B, K], or a tree of such arrays.
            images: within the threat's pixel range; of 16 bits they keep to the ball as well as
                their rounding allows.
            labels: int [B], or distributions over classes [B, K]; unused (may be None) by losses
                against the clean outputs.
            key: one PRNG key, or one per image (shape [B]); or a seed, 0 to 2^32 - 1.
            clean_outputs: ``function(images)`` if the caller has it already; only used by losses
                against the clean outputs, which compute it otherwise.

        Returns:
            Images of the same shape and dtype, in the ball and in the pixel range.

        Raises:
            ValueError: if images, labels or the threat cannot be meant (see ``admissible``), or
                the outputs are not what the loss compares.
        """


def pgd(
    threat: Threat,
    *,
    num_steps: int,
    step_size: float | Array | Schedule,
    loss: str | Loss = "cross_entropy",
    start: str | Start | AnyImages = "uniform",
    start_scale: float = 0.001,
    momentum: float = 0.0,
    restarts: int = 1,
    targeted: bool = False,
    eot_samples: int = 0,
) -> Attack:
    """Projected gradient descent (Madry et al., 2018, eq. 2.2).

    Args:
        threat: the ball and the pixel range.
        num_steps: gradient steps.
        step_size: length of one step in the threat's norm, in units of the pixel range; or a
            function from the step's number (0 to ``num_steps - 1``, traced) to it.
        loss: what is maximised: ``cross_entropy``, ``margin``, ``dlr``, ``kl`` (against the clean
            outputs, as in TRADES), or a ``Loss``.
        start: ``none`` (the clean image), ``uniform`` (in the ball), ``gaussian`` or ``signs``
            (of Gaussian noise); or a function ``(threat, images, keys) -> images`` with one PRNG
            key per image, whose images are projected.
        start_scale: standard deviation of the Gaussian start, size of the signs.
        momentum: decay of the accumulated gradient, normalised by its mean absolute value
            (MI-FGSM, Dong et al., 2018, eq. 6); 0 is plain PGD.
        restarts: independent runs. Per image, one that reaches the attacker's aim beats one that
            does not, then the higher loss wins. Run ``i`` draws the same start however many there
            are, so that more restarts never find a weaker image.
        targeted: the labels are classes to reach instead of classes to leave.
        eot_samples: not 0: the function is randomised, ``function(images, keys)`` with one PRNG
            key per image, and each step averages over that many draws.

    Raises:
        ValueError: if a setting is not valid.
    """
    loss = make_loss(loss) if isinstance(loss, str) else loss
    begin = _make_start(start, start_scale)
    _check_numbers(num_steps, step_size, restarts, eot_samples)
    if targeted and loss.against_clean:
        raise ValueError("a targeted attack needs a loss of the labels, such as cross_entropy")
    is_of_labels = takes_labels(loss)
    loss = aimed_at(loss) if targeted else loss

    def noise(keys: Array, step: int | Array) -> Array:
        return fold_in(keys, step) if eot_samples else keys

    def outputs_at(function: Callable[..., Any], images: Array, keys: Array) -> Any:
        return mean_outputs(function, images, keys, eot_samples)

    def attack(
        function: Callable[..., Any],
        images: Array,
        labels: Array | None,
        key: Array,
        clean_outputs: Any = None,
    ) -> Array:
        check_images(threat, images)
        if is_of_labels:
            check_labels(images, labels)
        keys = per_image_keys(key, images.shape[0])
        target = labels
        if loss.against_clean:
            given = clean_outputs is not None
            target = clean_outputs if given else outputs_at(function, images, keys)
        target = lax.stop_gradient(target)

        def run(i: int | Array) -> Array:
            run_keys = fold_in(keys, i)
            return _ascend(
                lambda x, step: loss_and_gradient(
                    function, loss, x, target, noise(run_keys, step + 1), eot_samples
                )[2],
                begin(threat, images, run_keys),
                images,
                threat,
                num_steps,
                step_size,
                momentum,
            )

        if restarts == 1:
            return lax.stop_gradient(run(0))

        def restart(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            candidate = run(i)
            # Noise of its own: not what a later run's start is drawn from.
            outputs = outputs_at(function, candidate, noise(keys, 2**31))
            value, fooled = loss.value(outputs, target), loss.fooled(outputs, target)
            better = (fooled & ~best[2]) | ((fooled == best[2]) & (value > best[1]))
            return (
                jnp.where(_per_image(better, images), candidate, best[0]),
                jnp.where(better, value, best[1]),
                best[2] | fooled,
            )

        # Made like the images, so that they vary over the same mesh axes inside a shard_map.
        worst = jnp.full_like(images, -jnp.inf, jnp.float32, images.shape[:1])
        none_yet = (images, worst, jnp.zeros_like(worst, bool))
        return lax.stop_gradient(repeat(restarts, restart, none_yet)[0])

    return attack


def fgsm(threat: Threat, loss: str | Loss = "cross_entropy") -> Attack:
    """One step as long as the ball's radius, from the clean image (Goodfellow et al., 2015)."""
    return pgd(threat, num_steps=1, step_size=threat.epsilon, loss=loss, start="none")


def per_image_keys(key: Array | int, batch: int) -> Array:
    """One key per image: ``key`` itself if it is already a batch of keys, else split from it.

    Raises:
        ValueError: if it is neither keys nor a seed, or there are not as many as images.
    """
    if isinstance(key, int | np.integer):
        if not 0 <= key < 2**32:
            raise ValueError(f"the seed {key} must be from 0 to 2^32 - 1")
        key = jax.random.key(int(key))
    if getattr(key, "shape", None) == () and jnp.issubdtype(key.dtype, jnp.integer):
        key = jax.random.key(key)
    if not hasattr(key, "dtype"):
        raise ValueError(f"the key is {key!r}: give jax.random.key(0), or a seed such as 0")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise ValueError(f"{key.shape} keys given for {batch} images: give one key or {batch}")
    return key


def _check_numbers(
    num_steps: int, step_size: float | Array | Schedule, restarts: int, eot_samples: int
) -> None:
    if num_steps < 0 or restarts < 1:
        raise ValueError(f"num_steps={num_steps} and restarts={restarts} must be positive")
    if eot_samples < 0:
        raise ValueError(f"eot_samples={eot_samples} must be 0 or positive")
    if isinstance(step_size, int | float) and not step_size > 0:
        raise ValueError(f"step_size={step_size} must be positive")


def _make_start(start: str | Start | AnyImages, scale: float | Array) -> Start:
    if hasattr(start, "shape"):
        return lambda threat, images, keys: project(threat, _like(start, images), images)
    if callable(start):
        return lambda threat, images, keys: project(threat, start(threat, images, keys), images)
    if start not in STARTS:
        raise ValueError(f"start {start!r} is unknown; choose one of {', '.join(STARTS)}")
    return STARTS[start](scale)


def _like(start: AnyImages, images: AnyImages) -> AnyImages:
    if start.shape != images.shape:
        raise ValueError(f"the start is {start.shape}, the images are {images.shape}: give as many")
    return jnp.asarray(start, images.dtype)


def _ascend(
    gradient_of: Callable[[Array, Array], Array],
    start: Array,
    clean: Array,
    threat: Threat,
    num_steps: int,
    step_size: float | Array | Schedule,
    momentum: float,
) -> Array:
    """``num_steps`` projected steps along ``gradient_of(images, step)`` from ``start``."""
    axes = tuple(range(1, clean.ndim))
    tiny = jnp.finfo(clean.dtype).tiny

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        images, velocity = carry
        gradient = gradient_of(images, i)
        if momentum:
            scale = jnp.mean(jnp.abs(gradient), axis=axes, keepdims=True)
            velocity = momentum * velocity + gradient / jnp.maximum(scale, tiny)
            gradient = velocity
        length = step_size(i) if callable(step_size) else step_size
        moved = images + length * steepest(threat, gradient)
        return project(threat, moved, clean), velocity

    velocity = jnp.zeros_like(clean) if momentum else jnp.zeros(())
    return repeat(num_steps, step, (start, velocity))[0]


def _per_image(flags: Array, images: Array) -> Array:
    return flags.reshape(flags.shape + (1,) * (images.ndim - 1))
