"""RDI-Nets with ResNet-38 on CIFAR-10, in the setting of the paper (Hu et al., ICLR 2020).

63,882 steps of 128 images; the published code counts 64,000, each of a fresh shuffle. Every tenth
training image is kept apart to choose thresholds with.
"""

from advmoe_jax import defaults


def get_config():
    """What differs from the defaults."""
    config = defaults.cnn()
    config.method = "multi_exit"
    config.num_epochs = 182

    config.model.name = "resnet38_cifar"
    config.model.num_experts = 1
    config.model.ratio = 1.0
    config.model.exits = (2, 5, 8, 11, 14, 17)
    config.model.mean = (0.0,)  # images are not normalised
    config.model.std = (1.0,)

    config.attack.epsilon = 0.03137  # 8/255, rounded as published
    config.attack.num_steps = 10
    config.attack.step_size = 0.00784

    config.optimizer.experts.weight_decay = 1e-4
    config.optimizer.experts.schedule = "drops"
    config.optimizer.experts.drops = (32 / 64, 48 / 64)

    config.evaluation.attacks = "clean,pgd20"
    config.evaluation.step_size = 0.00784
    return config
