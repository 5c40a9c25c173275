"""A mixture of experts with side exits on the digits, trained by AdvMoE: three minutes on two CPUs.

Router and exits decide together what an image costs; the losses of AdvMoE are summed over exits.
"""

import rdi_digits


def get_config():
    """What differs from ``rdi_digits.py``."""
    config = rdi_digits.get_config()
    config.method = "advmoe"
    config.model.num_experts = 2
    config.model.ratio = 0.5
    config.model.router.width = 8
    config.model.router.blocks = 1
    config.evaluation.attacks = "clean,pgd20,router"
    return config
