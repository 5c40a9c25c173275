"""AdvMoE with ResNet-18 on ImageNet at 224x224: else as ``cifar10_resnet18.py``."""

import cifar10_resnet18


def get_config():
    """What differs from ``cifar10_resnet18.py``."""
    config = cifar10_resnet18.get_config()
    config.batch_size = 256
    config.model.name = "resnet18_imagenet"
    config.model.dtype = "bfloat16"
    config.model.mean = (0.485, 0.456, 0.406)
    config.model.std = (0.229, 0.224, 0.225)
    config.model.router.resolution = 32  # the published router costs more than the dense network

    config.data.source = "image_folder"
    config.data.path = "imagenet"  # a directory: train/<class>/*.JPEG, val/<class>/*.JPEG
    config.data.test_split = "val"
    config.data.image_size = 224
    config.data.stream = True  # decoded while the device computes, by data.workers processes
    config.data.validation_fraction = 0.005
    config.data.crop_padding = 0
    config.data.crop_area = 0.08
    config.data.crop_whole = True

    config.attack.epsilon = 4 / 255
    config.attack.step_size = 2.5 / 255
    config.evaluation.step_size = 1 / 255
    return config
