"""The paper's table for ResNet-18 on CIFAR-10, in its settings (else as ``compare_digits.py``)."""

import cifar10_resnet18
import compare_digits


def get_config():
    """What differs from the comparison named above."""
    config = compare_digits.get_config()
    config.remark = ""
    config.strong_examples = 1000  # 0 for the paper's 10,000
    config.explained_examples = 1000

    config.run = cifar10_resnet18.get_config()
    config.run.pruning.epochs = 20
    config.run.checkpoint.keep = 1  # what is cut off can be moved elsewhere, and goes on there
    return config
