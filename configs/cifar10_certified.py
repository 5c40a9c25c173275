"""AdvMoE whose routes an attacker can seldom move: ResNet-18 on CIFAR-10; wants an accelerator."""

import cifar10_resnet18
import recipe_rows


def get_config():
    """``cifar10_resnet18.py`` with the changes of the row ``certified_shared``."""
    config = cifar10_resnet18.get_config()
    config.update(recipe_rows.rows(resolution=32)["certified_shared"].changes)
    return config
