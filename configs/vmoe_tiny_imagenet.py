"""V-MoE on Tiny-ImageNet at 64x64: else as ``vmoe_cifar10.py``."""

import vmoe_cifar10


def get_config():
    """What differs from ``vmoe_cifar10.py``."""
    config = vmoe_cifar10.get_config()
    config.model.name = "vit_tiny_64"

    config.data.source = "image_folder"
    config.data.path = "tiny-imagenet-200.zip"  # as it is distributed, packed or not
    config.data.test_split = "val"
    config.data.crop_padding = 8
    return config
