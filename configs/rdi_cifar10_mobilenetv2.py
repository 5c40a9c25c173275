"""RDI-Nets with MobileNetV2 on CIFAR-10: as ``rdi_cifar10_resnet38.py``, with 82,000 steps."""

import rdi_cifar10_resnet38


def get_config():
    """What differs from ``rdi_cifar10_resnet38.py``."""
    config = rdi_cifar10_resnet38.get_config()
    config.num_epochs = 234
    config.model.name = "mobilenet_v2"
    config.model.exits = (1, 4, 7, 9, 12, 15)
    config.optimizer.experts.learning_rate = 0.05
    config.optimizer.experts.drops = (61.7 / 82, 70 / 82, 78 / 82)
    return config
