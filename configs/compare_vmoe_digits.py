"""ViT against V-MoE on scikit-learn's digits; docs/vmoe.md says how long it takes."""

import vmoe_digits
import vmoe_rows

from advmoe_jax import defaults


def get_config():
    """The comparison; ``run`` is the mixture's config, the other rows follow from it."""
    config = defaults.comparison()
    config.table = vmoe_rows.rows(hidden=64)
    config.rows = "vit,vit_wide,e2_k1,e4_k1,e8_k1,e16_k1,e2_k2,e4_k2,e8_k2,e16_k2,advmoe_e4_k1"
    config.reference = "vit"
    config.attacks = "pgd50,vmoe_pgd"
    config.strong_attacks = "autoattack,route,joint,frozen_route"
    config.strong_examples = 100
    config.explained_attack = "vmoe_pgd"

    config.run = vmoe_digits.get_config()
    config.run.num_epochs = 20
    return config
