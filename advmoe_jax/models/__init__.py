"""Networks: what maps images to logits."""

from advmoe_jax.models.cnn import BACKBONES, CNN, RouterSettings
from advmoe_jax.models.network import Model, Network, Normalize, Output, functional
from advmoe_jax.models.registry import FAMILIES, Architecture
from advmoe_jax.models.resnet import ResNet
from advmoe_jax.models.router import PRESETS, SCOPES, LayerRouters, Router

__all__ = [
    "BACKBONES",
    "CNN",
    "FAMILIES",
    "PRESETS",
    "SCOPES",
    "Architecture",
    "LayerRouters",
    "Model",
    "Network",
    "Normalize",
    "Output",
    "ResNet",
    "Router",
    "RouterSettings",
    "functional",
]
