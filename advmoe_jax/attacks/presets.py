"""Attacks of the literature that are settings of ``pgd``, each under its paper's name.

PGD itself (Madry et al., 2018) is ``pgd(linf(epsilon), ...)``, PGD-l2 ``pgd(l2(epsilon), ...)``;
FGSM is ``fgsm``.
"""

import jax

from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.losses import Loss
from advmoe_jax.attacks.pgd import Attack, pgd


def r_fgsm(
    threat: Threat, alpha: float | None = None, loss: str | Loss = "cross_entropy"
) -> Attack:
    """R+FGSM (Tramer et al., "Ensemble adversarial training", ICLR 2018, eq. 7).

    A random step of length ``alpha`` (default epsilon / 2), then one gradient step of the rest.

    Raises:
        ValueError: if alpha is not between 0 and epsilon.
    """
    alpha = threat.epsilon / 2 if alpha is None else alpha
    is_known = not isinstance(alpha, jax.core.Tracer)
    if is_known and not 0 < alpha < threat.epsilon:
        raise ValueError(f"alpha={alpha} must lie between 0 and epsilon={threat.epsilon}")
    step = threat.epsilon - alpha
    return pgd(threat, num_steps=1, step_size=step, loss=loss, start="signs", start_scale=alpha)


def ffgsm(
    threat: Threat, step_size: float | None = None, loss: str | Loss = "cross_entropy"
) -> Attack:
    """FGSM from a uniform start (Wong et al., "Fast is better than free", ICLR 2020).

    ``step_size`` is 1.25 epsilon by default, as there.
    """
    step_size = 1.25 * threat.epsilon if step_size is None else step_size
    return pgd(threat, num_steps=1, step_size=step_size, loss=loss)


def mi_fgsm(
    threat: Threat,
    *,
    num_steps: int = 10,
    step_size: float | None = None,
    decay: float = 1.0,
    loss: str | Loss = "cross_entropy",
    targeted: bool = False,
) -> Attack:
    """MI-FGSM (Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018).

    Steps of epsilon / num_steps by default, from the clean image.
    """
    step_size = threat.epsilon / max(num_steps, 1) if step_size is None else step_size
    return pgd(
        threat,
        num_steps=num_steps,
        step_size=step_size,
        loss=loss,
        start="none",
        momentum=decay,
        targeted=targeted,
    )


def eot_pgd(
    threat: Threat,
    *,
    eot_samples: int,
    num_steps: int,
    step_size: float,
    loss: str | Loss = "cross_entropy",
    restarts: int = 1,
) -> Attack:
    """PGD on a randomised ``function(images, keys)``, by the mean of ``eot_samples`` gradients.

    Expectation over transformation: Athalye et al., "Synthesizing robust adversarial examples",
    ICML 2018. ``keys`` is one PRNG key per image.

    Raises:
        ValueError: if ``eot_samples`` is not positive.
    """
    if eot_samples < 1:
        raise ValueError(f"eot_samples={eot_samples} must be positive")
    return pgd(
        threat,
        num_steps=num_steps,
        step_size=step_size,
        loss=loss,
        restarts=restarts,
        eot_samples=eot_samples,
    )


def tpgd(threat: Threat, *, num_steps: int = 10, step_size: float) -> Attack:
    """The inner maximisation of TRADES (Zhang et al., ICML 2019): KL to the clean outputs.

    Starts at ``images + 0.001 N(0, I)``; labels are not looked at.
    """
    return pgd(threat, num_steps=num_steps, step_size=step_size, loss="kl", start="gaussian")
