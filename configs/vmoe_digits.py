"""V-MoE on scikit-learn's digits, adversarially trained: two minutes on two CPU cores.

The dense ViT: ``--config.model.num_experts=1``. Two experts per token: ``--config.model.top_k=2``.
"""

from advmoe_jax import defaults


def get_config():
    """What differs from the family's defaults."""
    config = defaults.vit()
    config.num_epochs = 30
    config.batch_size = 64

    config.model.name = "vit_tiny_8"
    config.model.num_experts = 4
    config.model.mean = (0.5,)
    config.model.std = (0.5,)

    config.data.source = "digits"
    config.data.crop_padding = 0
    config.data.flip = False

    config.attack.epsilon = 0.1
    config.attack.num_steps = 3
    config.attack.step_size = 0.05

    config.balance.noise = 0.25  # 1 / num_experts
    for group in (config.optimizer.experts, config.optimizer.router):
        group.learning_rate = 3e-3

    config.evaluation.attacks = "clean,fgsm,pgd20"
    config.evaluation.step_size = 0.0125
    config.evaluation.batch_size = 360
    return config
