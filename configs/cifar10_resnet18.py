"""AdvMoE with ResNet-18 on CIFAR-10, the setting of the published code.

That setting is what ``advmoe_jax/defaults.py`` holds, value by value.
"""

from advmoe_jax import defaults


def get_config():
    """The defaults as they are."""
    return defaults.cnn()
