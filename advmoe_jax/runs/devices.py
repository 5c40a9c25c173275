"""The devices of a run: how many, and whether they share the experts."""

import math

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.models.vit import ViT
from advmoe_jax.parallel import data_mesh
from advmoe_jax.runs import build


def training_mesh(config: ConfigDict) -> Mesh:
    """The devices that a run is trained on.

    Raises:
        UserError: if they cannot be had, or cannot share the network's experts as is asked.
    """
    shards, network = config.expert_shards, build.architecture(config)
    if shards > 1 and not isinstance(network, ViT):
        raise UserError(
            f"expert_shards={shards} needs config.family='vit': the experts of a CNN fit on every "
            "device, and its activations are larger than they; set expert_shards=1"
        )
    if network.num_experts % shards:
        raise UserError(
            f"model.num_experts={network.num_experts} is not a multiple of expert_shards={shards}: "
            f"set expert_shards={math.gcd(network.num_experts, shards)}, say"
        )
    return data_mesh(config.num_devices, shards)


def measuring_mesh(config: ConfigDict) -> Mesh:
    """The devices that a run is measured on: its own, or as many of them as this machine has."""
    count = min(config.num_devices or jax.device_count(), jax.device_count())
    return data_mesh(count, math.gcd(config.expert_shards, count))
