"""ViT against V-MoE on MNIST, for one GPU; ``compare_vmoe_mnist_small.py`` is for two CPU cores."""

import compare_vmoe_digits
import vmoe_mnist
import vmoe_rows


def get_config():
    """What differs from ``compare_vmoe_digits.py``."""
    config = compare_vmoe_digits.get_config()
    config.table = vmoe_rows.rows(hidden=128)
    config.examples = 1000
    config.run = vmoe_mnist.get_config()
    return config
