"""Data parallelism: one device, eight, or a pod of hosts run the same step.

A step is written for one device with a named axis; here it is mapped over a mesh with
``jit(shard_map(...))``, the present form of ``pmap``. States and data sets are replicated; each
device takes its own part of every batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmoe_jax.errors import UserError

DATA_AXIS = "data"


def data_mesh(num_devices: int = 0) -> Mesh:
    """A mesh of one axis, ``data``, over the first ``num_devices`` devices (0: all of them)."""
    devices = jax.devices()
    if num_devices > len(devices):
        raise UserError(f"num_devices={num_devices}, but this machine has {len(devices)}")
    devices = devices[: num_devices or len(devices)]
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), devices=devices, axis_types=(AxisType.Auto,)
    )


def check_batch(name: str, batch_size: int, mesh: Mesh, microbatches: int = 1) -> None:
    """Raises UserError unless every microbatch of every device gets the same number of images."""
    parts = mesh.size * microbatches
    if batch_size < 1 or batch_size % parts:
        of_each = f" times {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{name}={batch_size} is not a positive multiple of the {mesh.size} devices{of_each}; "
            f"try {max(batch_size // parts, 1) * parts}"
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies of the same arrays on every device of the mesh, safe to donate.

    ``device_put`` will not do: on CPU all devices would share the memory of one array, and write
    to it at once when it is donated.
    """
    copy = jax.jit(_copy, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return copy(jax.tree.map(np.asarray, tree))


def replicated_shapes(tree: Any, mesh: Mesh) -> Any:
    """What is known of ``replicate``'s result before there are arrays: shapes, dtypes, devices."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays of the host, the same in every process, on the devices; those that are there stay.

    Each process fills its own devices: nothing travels.
    """

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])

    return jax.device_put(tree, sharding) if jax.process_count() == 1 else jax.tree.map(put, tree)


def whole(tree: Any) -> Any:
    """The arrays on the host, in every process, wherever their parts lie; all have to call this."""

    def get(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(get, tree)


def first_says(word: bool) -> bool:
    """What the first process says, in every process; all have to call this."""
    if jax.process_count() == 1:
        return word
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(word)))


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def on_mesh(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any,
    out_specs: Any = PartitionSpec(),  # noqa: B008
) -> Callable[..., Any]:
    """``shard_map(function)`` over the mesh, to be called under ``jit``.

    Replication is not checked by the type system (``check_vma=False``): then gradients of
    replicated parameters stay local until the step averages them, exactly as under ``pmap``.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def parallel(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any,
    out_specs: Any = PartitionSpec(),  # noqa: B008
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """``jit(on_mesh(function))``; ``donate`` are argument positions."""
    mapped = on_mesh(function, mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped, donate_argnums=donate)
