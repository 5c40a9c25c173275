"""RDI-Nets on scikit-learn's digits: a ResNet-10 with three side exits, two minutes on two CPUs."""

from advmoe_jax import defaults


def get_config():
    """What differs from the defaults."""
    config = defaults.cnn()
    config.method = "multi_exit"
    config.num_epochs = 12
    config.batch_size = 64

    config.model.name = "resnet10_cifar"
    config.model.num_experts = 1
    config.model.ratio = 1.0
    config.model.width = 16
    config.model.exits = (1, 2, 3)
    config.model.mean = (0.5,)
    config.model.std = (0.25,)

    config.data.source = "digits"
    config.data.crop_padding = 0
    config.data.flip = False

    config.attack.epsilon = 0.2
    config.attack.num_steps = 3
    config.attack.step_size = 0.1

    config.evaluation.attacks = "clean,pgd20"
    config.evaluation.step_size = 0.02
    config.evaluation.batch_size = 360
    return config
