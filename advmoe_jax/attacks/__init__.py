"""Attacks: pure functions from images to adversarial images, for any JAX function."""

from advmoe_jax.attacks.apgd import apgd
from advmoe_jax.attacks.autoattack import AttackReport, AutoAttackResult, autoattack
from advmoe_jax.attacks.checks import check
from advmoe_jax.attacks.constraints import Threat, l1, l2, linf, make_threat
from advmoe_jax.attacks.cw import cw
from advmoe_jax.attacks.deepfool import deepfool
from advmoe_jax.attacks.fab import fab
from advmoe_jax.attacks.losses import (
    LOSSES,
    Loss,
    cross_entropy,
    dlr,
    dlr_targeted,
    kl,
    margin,
    targeted,
)
from advmoe_jax.attacks.moe import MoEResult, moe_suite, pathways
from advmoe_jax.attacks.pgd import Attack, fgsm, pgd
from advmoe_jax.attacks.presets import eot_pgd, ffgsm, mi_fgsm, r_fgsm, tpgd
from advmoe_jax.attacks.routing import (
    Answer,
    Pathways,
    Routed,
    gate_attack,
    joint_attack,
    route_attack,
    through_gate,
    worst_pathway,
)
from advmoe_jax.attacks.square import square

__all__ = [
    "LOSSES",
    "Answer",
    "Attack",
    "AttackReport",
    "AutoAttackResult",
    "Loss",
    "MoEResult",
    "Pathways",
    "Routed",
    "Threat",
    "apgd",
    "autoattack",
    "check",
    "cross_entropy",
    "cw",
    "deepfool",
    "dlr",
    "dlr_targeted",
    "eot_pgd",
    "fab",
    "ffgsm",
    "fgsm",
    "gate_attack",
    "joint_attack",
    "kl",
    "l1",
    "l2",
    "linf",
    "make_threat",
    "margin",
    "mi_fgsm",
    "moe_suite",
    "pathways",
    "pgd",
    "r_fgsm",
    "route_attack",
    "square",
    "targeted",
    "through_gate",
    "tpgd",
    "worst_pathway",
]
