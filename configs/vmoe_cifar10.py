"""V-MoE on CIFAR-10, adversarially trained on one GPU; ``--config.model.num_experts=1``: ViT.

8 blocks of width 192 on patches of 4x4: 244 million MACs, 11.9 million parameters with 8 experts of
which a token takes one, 3.6 million dense.
"""

from advmoe_jax import defaults


def get_config():
    """What differs from the family's defaults."""
    config = defaults.vit()
    config.num_epochs = 100
    config.batch_size = 256
    config.model.dtype = "bfloat16"
    config.balance.noise = 0.125  # 1 / num_experts
    config.attack.num_steps = 7
    config.attack.step_size = 2 / 255
    return config
