"""Parallelism: one device, eight, or a pod of hosts run the same step.

A step is written for one device with named axes; here it is mapped over a mesh with
``jit(shard_map(...))``, the present form of ``pmap``. Each device takes its own part of every
batch. States and data sets are replicated; but experts may be spread over a second axis, and with
them what optimizers and averages keep of them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmoe_jax.errors import UserError

DATA_AXIS, EXPERT_AXIS = "data", "expert"


def batch_axes(expert_shards: int = 1) -> tuple[str, ...]:
    """The axes of a mesh, over all of which batches are spread."""
    return (DATA_AXIS,) if expert_shards == 1 else (DATA_AXIS, EXPERT_AXIS)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """How the first axis of a batch is spread: over all devices, each a contiguous part."""
    return PartitionSpec(mesh.axis_names)


def data_mesh(num_devices: int = 0, expert_shards: int = 1) -> Mesh:
    """A mesh over the first ``num_devices`` devices (0: all of them).

    Args:
        num_devices: how many.
        expert_shards: 1: the mesh has one axis, ``data``. More: it has two, ``data`` and
            ``expert``, the second of that size and over neighbours.

    Raises:
        UserError: if there are not so many devices, or ``expert_shards`` does not divide them.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise UserError(f"num_devices={num_devices}, but this machine has {len(devices)}")
    devices = devices[: num_devices or len(devices)]
    if expert_shards < 1 or len(devices) % expert_shards:
        raise UserError(
            f"expert_shards={expert_shards} does not divide the {len(devices)} devices: set it to "
            f"{math.gcd(max(expert_shards, 1), len(devices))}, say, or num_devices to a multiple"
        )
    axes = batch_axes(expert_shards)
    shape = (len(devices) // expert_shards, expert_shards)[: len(axes)]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(AxisType.Auto,) * len(axes))


def state_specs(tree: Any, expert_parameters: Sequence[str], mesh: Mesh) -> Any:
    """How a state is spread over the mesh: a tree like it of PartitionSpecs.

    Args:
        tree: parameters, or whatever holds trees of the same names: an optimizer's state, a whole
            training state.
        expert_parameters: names of the parameters whose first axis counts the experts, as in
            ``Network.expert_parameters``. They are spread over the mesh's axis ``expert``, if it
            has one, and so is what ends in the same names; the rest is replicated.
        mesh: the devices.
    """
    ends = tuple(f"/{name}" for name in expert_parameters)

    def spec(path: Any, leaf: Any) -> PartitionSpec:
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        return PartitionSpec(EXPERT_AXIS) if name.endswith(ends) else PartitionSpec()

    if EXPERT_AXIS not in mesh.axis_names:
        return jax.tree.map(lambda _: PartitionSpec(), tree)
    return jax.tree_util.tree_map_with_path(spec, tree)


def in_host_memory() -> AbstractContextManager[Any]:
    """What is made inside lies in the host's memory, where no device could hold it.

    Raises:
        UserError: if JAX was told to leave the host's processors out.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        raise UserError(
            "expert_shards makes the first values on the CPU, which JAX_PLATFORMS leaves out: set "
            f"JAX_PLATFORMS={jax.default_backend()},cpu"
        ) from None


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


def distribute(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """As ``replicate``, but every array is spread as its PartitionSpec says, see ``state_specs``.

    A device gets its own part, and never holds a whole that is spread.
    """
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda where: x[where])

    return jax.jit(_copy, out_shardings=shardings)(jax.tree.map(put, tree, shardings))


def distributed_shapes(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """What is known of ``distribute``'s result before there are arrays: shapes, dtypes, devices."""

    def shape(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(shape, tree, specs)


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
