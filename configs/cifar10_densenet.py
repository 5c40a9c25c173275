"""AdvMoE with DenseNet-BC-40 on CIFAR-10: as ``cifar10_resnet18.py``, with a smaller router."""

import cifar10_resnet18


def get_config():
    """What differs from ``cifar10_resnet18.py``."""
    config = cifar10_resnet18.get_config()
    config.model.name = "densenet_cifar"
    # The published router at 32x32 costs twice a pathway of this network.
    config.model.router.resolution = 16
    return config
