"""RDI-Nets with SmallCNN on MNIST, in the setting of the paper (Hu et al., ICLR 2020).

13,054 steps of 256 images; the published code counts 13,100, each of a fresh shuffle. A twelfth of
the training images is kept apart to choose thresholds with. On two CPU cores the attack of 40 steps
is out of reach: docs/rdi.md has a shortened run.
"""

from advmoe_jax import defaults


def get_config():
    """What differs from the defaults."""
    config = defaults.cnn()
    config.method = "multi_exit"
    config.num_epochs = 61
    config.batch_size = 256

    config.model.name = "small_cnn"
    config.model.num_experts = 1
    config.model.ratio = 1.0
    config.model.exits = (1, 3)
    config.model.mean = (0.0,)  # images are not normalised
    config.model.std = (1.0,)

    config.data.source = "image_folder"
    config.data.path = "mnist_png.tar.gz"
    config.data.crop_padding = 0
    config.data.flip = False
    config.data.validation_fraction = 1 / 12

    config.attack.epsilon = 0.3
    config.attack.num_steps = 40
    config.attack.step_size = 0.01

    config.optimizer.experts.learning_rate = 0.033
    config.optimizer.experts.schedule = "drops"
    config.optimizer.experts.drops = (11_700 / 13_100, 12_900 / 13_100)

    config.evaluation.attacks = "clean,pgd40"
    config.evaluation.step_size = 0.01
    config.evaluation.validation_steps = 40
    return config
