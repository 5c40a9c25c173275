"""AdvMoE with ResNet-18 on Tiny-ImageNet at 64x64: else as ``cifar10_resnet18.py``."""

import cifar10_resnet18


def get_config():
    """What differs from ``cifar10_resnet18.py``."""
    config = cifar10_resnet18.get_config()
    config.model.mean = (0.4802, 0.4481, 0.3975)
    config.model.std = (0.2770, 0.2691, 0.2821)

    config.data.source = "image_folder"
    config.data.path = "tiny-imagenet-200.zip"  # as it is distributed, packed or not
    config.data.test_split = "val"
    config.data.crop_padding = 8
    return config
