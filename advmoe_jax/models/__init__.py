"""Networks: what maps images to logits."""

from advmoe_jax.models.cnn import BACKBONES, CNN, RouterSettings
from advmoe_jax.models.model import Model
from advmoe_jax.models.network import Network, functional
from advmoe_jax.models.output import Normalize, Output
from advmoe_jax.models.registry import FAMILIES, Architecture, model
from advmoe_jax.models.resnet import ResNet
from advmoe_jax.models.route_bounds import are_certified
from advmoe_jax.models.router import PRESETS, SCOPES, LayerRouters, LinearRouter, Router
from advmoe_jax.models.vit import SIZES, ViT

__all__ = [
    "BACKBONES",
    "CNN",
    "FAMILIES",
    "PRESETS",
    "SCOPES",
    "SIZES",
    "Architecture",
    "LayerRouters",
    "LinearRouter",
    "Model",
    "Network",
    "Normalize",
    "Output",
    "ResNet",
    "Router",
    "RouterSettings",
    "ViT",
    "are_certified",
    "functional",
    "model",
]
