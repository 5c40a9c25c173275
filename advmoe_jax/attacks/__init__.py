"""Attacks: pure functions from images to adversarial images, for any JAX function."""

from advmoe_jax.attacks.constraints import Threat, l2, linf, make_threat
from advmoe_jax.attacks.losses import LOSSES, Loss, cross_entropy, dlr, kl, margin
from advmoe_jax.attacks.pgd import Attack, fgsm, pgd

__all__ = [
    "LOSSES",
    "Attack",
    "Loss",
    "Threat",
    "cross_entropy",
    "dlr",
    "fgsm",
    "kl",
    "l2",
    "linf",
    "make_threat",
    "margin",
    "pgd",
]
