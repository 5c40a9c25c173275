"""How many images a second networks classify: all of them in turn, in one process."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.data.augment import to_float
from advmoe_jax.evaluation import dynamic
from advmoe_jax.evaluation.timing import alternate
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import DATA_AXIS, on_mesh, replicate
from advmoe_jax.types import Array, Labels, Tree

ROUNDS, SECONDS = 15, 120.0


def images_per_second(
    networks: Mapping[Any, tuple[Network, Tree, Tree]], images: np.ndarray, mesh: Mesh
) -> dict[Any, float]:
    """Images that each network classifies in a second, from images to predictions on the device.

    Those that leave a multi-exit network early are packed away, see ``dynamic.classify``.

    Args:
        networks: network, parameters and statistics by name; how fast a mixture is depends on its
            routes, and so on its parameters.
        images: one batch, uint8 [B, H, W, C].
        mesh: the devices, which share the batch; B must be a multiple of their number.

    Returns:
        By name, B over the median time of a call. In each of up to ``ROUNDS`` rounds every network
        is called once, so a machine's drift meets all of them alike.
    """
    batch = jax.device_put(images, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
    calls = {
        name: partial(_classify, network, *replicate((params, stats), mesh), batch, mesh=mesh)
        for name, (network, params, stats) in networks.items()
    }
    times = alternate(calls, ROUNDS, SECONDS)
    return {name: len(images) / timing.median for name, timing in times.items()}


@partial(jax.jit, static_argnames="mesh")
def _classify(network: Network, params: Tree, stats: Tree, images: Array, *, mesh: Mesh) -> Labels:
    """Predictions, int32 [B], of images uint8 [B, H, W, C]."""

    def classify(params: Tree, stats: Tree, images: Array) -> Labels:
        if network.num_exits > 1:
            return dynamic.classify(network, params, stats, to_float(images)).predictions
        logits = network.apply(params, stats, to_float(images))[0].logits
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    whole, spread = PartitionSpec(), PartitionSpec(DATA_AXIS)
    mapped = on_mesh(classify, mesh, in_specs=(whole, whole, spread), out_specs=spread)
    return mapped(params, stats, images)
