"""ViT against V-MoE on CIFAR-10, for one GPU: standard and adversarial training."""

import compare_vmoe_digits
import vmoe_cifar10
import vmoe_rows


def get_config():
    """What differs from ``compare_vmoe_digits.py``."""
    config = compare_vmoe_digits.get_config()
    config.table = vmoe_rows.rows(hidden=768)
    config.rows += ",standard_vit,standard_e4_k1"
    config.strong_examples = 1000
    config.run = vmoe_cifar10.get_config()
    config.run.checkpoint.keep = 1
    return config
