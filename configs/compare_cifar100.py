"""The paper's table for ResNet-18 on CIFAR-100: else as ``compare_cifar10.py``."""

import compare_cifar10


def get_config():
    """What differs from the comparison named above."""
    config = compare_cifar10.get_config()
    config.run.model.mean = (0.5071, 0.4865, 0.4409)
    config.run.model.std = (0.2673, 0.2564, 0.2762)
    config.run.data.source = "tfds:cifar100"
    return config
