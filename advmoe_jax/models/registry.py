"""The families of models, by the name that a config gives them.

A family is a record of values with defaults that can be built: it has ``from_values``,
``parts``, ``check``, ``create``, ``dense`` and ``without_padding``, as ``CNN`` has.
"""

from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.vit import ViT

Architecture = CNN | ViT

FAMILIES: dict[str, type[Architecture]] = {
    "cnn": CNN,
    "vit": ViT,
}
