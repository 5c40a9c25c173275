"""V-MoE on MNIST, adversarially trained; ``--config.model.num_experts=1`` is its ViT."""

from advmoe_jax import defaults


def get_config():
    """What differs from the family's defaults."""
    config = defaults.vit()
    config.num_epochs = 20

    config.model.name = "vit_tiny_28"
    config.model.num_experts = 8
    config.model.mean = (0.1307,)
    config.model.std = (0.3081,)

    config.data.source = "tfds:mnist"  # or image_folder, with data.path=mnist_png.tar.gz, say
    config.data.crop_padding = 2
    config.data.flip = False

    config.attack.epsilon = 0.1
    config.attack.num_steps = 5
    config.attack.step_size = 0.03

    config.balance.noise = 0.125  # 1 / num_experts
    config.evaluation.step_size = 0.01
    return config
