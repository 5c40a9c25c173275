"""The paper's table for ResNet-18 on CIFAR-10, in the paper's settings; needs an accelerator."""

import cifar10_resnet18
import compare_digits


def get_config():
    """Every value of the comparison."""
    config = compare_digits.get_config()
    config.strong_examples = 1000  # 0 for the paper's 10,000
    config.explained_examples = 1000

    config.run = cifar10_resnet18.get_config()
    config.run.pruning.epochs = 20
    config.run.checkpoint.keep = 1  # what is cut off can be moved elsewhere, and goes on there
    return config
