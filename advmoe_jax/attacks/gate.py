"""Attacks through a mixture's gate: a surrogate whose choice of experts has a gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Key

from advmoe_jax.attacks.apgd import CLASSES
from advmoe_jax.attacks.constraints import AnyImages, Threat
from advmoe_jax.attacks.judged import Judged, judged_steps
from advmoe_jax.attacks.losses import make_loss
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.routed import Routed, answer_to
from advmoe_jax.attacks.stepwise import Batch, Stepwise, as_attack
from advmoe_jax.types import Array, Logits

NAMES = ("straight_through", "softmax", "hard")
# A router that finds all experts alike has no spread to measure noise by.
_LEAST_SPREAD = 1e-6


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
    gradients mask (see docs/true_gradient.md). The network itself judges every point. The function
    attacked must be ``Routed``; a step costs all experts of every layer, ``eot_samples`` times.

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
        threat,
        gate_steps(
            threat,
            gate,
            loss=loss,
            num_steps=num_steps,
            restarts=restarts,
            eot_samples=eot_samples,
            noise=noise,
            temperature=temperature,
        ),
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

    def view(function: Routed, batch: Batch) -> Callable[[Array, Array], Judged]:
        surrogate = through_gate(function, gate, noise=noise, temperature=temperature)
        return lambda images, keys: Judged(surrogate(images, keys), function(images))

    steps = judged_steps(
        threat,
        view,
        of_logits.value,
        look=answer_to,
        num_steps=num_steps,
        restarts=restarts,
        eot_samples=eot_samples,
    )
    identity = (*steps.identity, gate, loss, noise, temperature)
    return steps._replace(needs=CLASSES.get(loss, 2), identity=identity)


def through_gate(
    function: Routed, gate: str, *, noise: float = 0.25, temperature: float = 0.5
) -> Callable[[AnyImages, Key[Array, " batch"]], Logits]:
    """The function with another gate: (images, keys) -> logits.

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

    def logits(images: Array, keys: Array) -> Logits:
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


def _check_gate(gate: str, noise: float, temperature: float) -> None:
    if gate not in NAMES:
        raise ValueError(f"gate {gate!r} is unknown; choose one of {', '.join(NAMES)}")
    if noise < 0 or not temperature > 0:
        raise ValueError(f"noise={noise} must be at least 0, temperature={temperature} positive")
