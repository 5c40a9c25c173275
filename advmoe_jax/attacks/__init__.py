"""Attacks: pure functions from images to adversarial images, for any JAX function."""

from advmoe_jax.attacks.apgd import apgd
from advmoe_jax.attacks.constraints import Threat, box, l1, l2, linf, make_threat
from advmoe_jax.attacks.cw import cw
from advmoe_jax.attacks.deepfool import deepfool
from advmoe_jax.attacks.ensembles import (
    AttackReport,
    AutoAttackResult,
    MoEResult,
    autoattack,
    check,
    moe_suite,
    pathways,
)
from advmoe_jax.attacks.fab import fab
from advmoe_jax.attacks.gate import gate_attack, through_gate
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
from advmoe_jax.attacks.pathways import Pathways, worst_pathway
from advmoe_jax.attacks.pgd import Attack, fgsm, pgd
from advmoe_jax.attacks.presets import eot_pgd, ffgsm, mi_fgsm, r_fgsm, tpgd
from advmoe_jax.attacks.routed import Answer, Routed, joint_attack, route_attack
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
    "box",
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
