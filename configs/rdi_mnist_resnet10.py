"""RDI-Nets with a narrow ResNet-10 on MNIST: below 100,000 parameters, for CPUs.

Attacked in training by the average of its exits' losses, which costs one attack instead of one for
each exit and their average.
"""

import rdi_digits


def get_config():
    """What differs from the digits' setting."""
    config = rdi_digits.get_config()
    config.num_epochs = 6

    config.model.width = 8
    config.model.exits = (1, 2)
    config.model.mean = (0.1307,)
    config.model.std = (0.3081,)

    config.data.source = "image_folder"
    config.data.path = "mnist_png.tar.gz"
    config.data.validation_fraction = 1 / 12

    config.exits.defence = "average"
    config.attack.epsilon = 0.3
    # Fewer and larger steps leave networks that only seem robust at this radius.
    config.attack.num_steps = 7
    config.attack.step_size = 0.075

    config.evaluation.step_size = 0.01
    config.evaluation.attacks = "clean,pgd40"
    config.evaluation.validation_steps = 10
    return config
