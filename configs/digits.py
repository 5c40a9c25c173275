"""AdvMoE on scikit-learn's digits: two minutes on two CPU cores."""

from advmoe_jax import defaults


def get_config():
    """What differs from the setting of the published code."""
    config = defaults.cnn()
    config.num_epochs = 32
    config.batch_size = 64

    config.model.name = "resnet10_cifar"
    config.model.width = 16
    config.model.mean = (0.5,)
    config.model.std = (0.25,)
    config.model.router.width = 8
    config.model.router.blocks = 1

    config.data.source = "digits"
    config.data.crop_padding = 0
    config.data.flip = False

    config.attack.epsilon = 0.2
    config.attack.step_size = 0.125

    config.evaluation.attacks = "clean,fgsm,pgd20,router"
    config.evaluation.step_size = 0.02
    config.evaluation.batch_size = 360
    return config
