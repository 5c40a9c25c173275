"""The paper's table for ResNet-18 on Tiny-ImageNet: else as ``compare_cifar10.py``."""

import compare_cifar10
import tiny_imagenet_resnet18


def get_config():
    """What differs from the comparison named above."""
    config = compare_cifar10.get_config()
    config.run = tiny_imagenet_resnet18.get_config()
    config.run.pruning.epochs = 20
    config.run.checkpoint.keep = 1
    return config
