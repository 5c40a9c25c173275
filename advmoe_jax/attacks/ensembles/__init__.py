"""The host's side: attacks on any number of images, in batches, that can be stopped and resumed."""

from advmoe_jax.attacks.ensembles.autoattack import autoattack
from advmoe_jax.attacks.ensembles.checks import check
from advmoe_jax.attacks.ensembles.moe_suite import moe_suite, pathways
from advmoe_jax.attacks.ensembles.results import AttackReport, AutoAttackResult, MoEResult

__all__ = [
    "AttackReport",
    "AutoAttackResult",
    "MoEResult",
    "autoattack",
    "check",
    "moe_suite",
    "pathways",
]
