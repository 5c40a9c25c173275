"""What runs on the device: a program over rows, on the default device or split over a mesh.

What is compiled is shared by ``jit`` alone: a program's body and the mesh are static and
hashable, the arrays of the attacked function are arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.attacks.expectation import mean_outputs
from advmoe_jax.parallel import batch_spec, on_mesh, spread, whole
from advmoe_jax.types import Array

LEAST_SLOTS, LEAST_STEP = 16, 8  # to compile for fewer costs more than it saves
# (function, rows) -> rows: hashable, so that equal bodies share what is compiled. Rows are a tree
# of arrays that have the image as their first axis.
Body = Callable[[Any, Any], Any]
_STATIC = ("body", "mesh", "specs")


class Device(NamedTuple):
    """A function, and where it is attacked.

    Attributes:
        function: what is attacked, as ``as_partial`` returns it.
        mesh: rows are split over all its devices, and the function's arrays lie there as they are;
            None: the default device.
        specs: of the function's arrays, how they lie on the mesh.
        program: (rows, body=, mesh=, specs=) -> rows, compiled.
    """

    function: Any
    mesh: Mesh | None
    specs: tuple[PartitionSpec, ...]
    program: Callable[..., Any]

    @property
    def multiple(self) -> int:
        """What the number of rows must be a multiple of."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shared_axes(self) -> tuple[str, ...]:
        """Mesh axes whose devices need each other to call the function: all take as many steps."""
        return tuple(axis for axis in getattr(self.mesh, "axis_names", ()) if axis in self._spread)

    @property
    def _spread(self) -> set[str]:
        return {axis for spec in self.specs for axis in spec if axis is not None}

    def run(self, body: Body, rows: Any) -> Any:
        """``body(function, rows)`` on the device."""
        if self.mesh is not None:
            # Rows of the host are put where a former call's are: else two programs are compiled.
            rows = spread(rows, NamedSharding(self.mesh, batch_spec(self.mesh)))
        return self.program(rows, body=body, mesh=self.mesh, specs=self.specs)


def device_for(function: Callable[..., Any], mesh: Mesh | None = None) -> Device:
    """The function on a device, for one call of an ensemble.

    What is compiled serves later calls with other functions that differ in the arrays of their
    ``Partial`` alone. A function without such arrays may be a closure, whose arrays are constants
    in what is compiled and may be others by the next call: its programs are compiled for this
    device alone, and forgotten with it.
    """
    function = as_partial(function)
    specs = tuple(_spec(leaf, mesh) for leaf in jax.tree.leaves(function))
    if specs:
        return Device(function, mesh, specs, partial(_shared, function))
    # Not an argument, for those are remembered.
    alone = jax.jit(partial(_on_device, function), static_argnames=_STATIC)
    return Device(function, mesh, specs, alone)


def _spec(leaf: Any, mesh: Mesh | None) -> PartitionSpec:
    """How an array lies on the mesh; whole on every device, unless it is there already."""
    sharding = getattr(leaf, "sharding", None)
    is_there = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
    return sharding.spec if is_there else PartitionSpec()


def _on_device(
    function: Any, rows: Any, *, body: Body, mesh: Mesh | None, specs: tuple[PartitionSpec, ...]
) -> Any:
    if mesh is None:
        return body(function, rows)
    of_function = jax.tree.unflatten(jax.tree.structure(function), specs)
    of_rows = batch_spec(mesh)
    mapped = on_mesh(body, mesh, in_specs=(of_function, of_rows), out_specs=of_rows)
    return mapped(function, rows)


_shared = jax.jit(_on_device, static_argnames=_STATIC)


class Outputs(NamedTuple):
    """A body: (function, (images, key data)) -> outputs, or their mean over some draws."""

    eot_samples: int
    impl: str

    def __call__(self, function: Any, rows: tuple[Array, Array]) -> Array:
        """What runs on the device."""
        keys = jax.random.wrap_key_data(rows[1], impl=self.impl)
        outputs = mean_outputs(function, rows[0], keys, self.eot_samples)
        if not hasattr(outputs, "ndim"):
            raise ValueError(
                f"the function returns a {type(outputs).__name__}: it must return the logits "
                "alone, [batch, classes]; take them out, as in lambda x: function(x)[0]"
            )
        return outputs


def as_partial(function: Callable[..., Any]) -> Any:
    """A pytree: the arrays of a ``jax.tree_util.Partial`` stay arguments of what is compiled.

    A NamedTuple of functions that can be called itself, such as ``Routed``, stays one.
    """
    if isinstance(function, tuple):
        return type(function)(*map(as_partial, function))
    is_partial = isinstance(function, jax.tree_util.Partial | partial)
    if is_partial and not isinstance(function, jax.tree_util.Partial):
        return jax.tree_util.Partial(function.func, *function.args, **function.keywords)
    return function if is_partial else jax.tree_util.Partial(function)


def size_for(images: int, batch_size: int, multiple: int = 1) -> int:
    """The batch size up to ``batch_size`` that wastes fewest slots on so many images.

    As many batches as with the full size, each as small as will do but for an eighth, and not less
    than ``LEAST_SLOTS``: eight sizes between a power of two and the next, so that what was compiled
    for one evaluation often serves another.
    """
    batches = max(-(-images // batch_size), 1)
    needed = max(-(-images // batches), LEAST_SLOTS)
    step = max(2 ** (needed.bit_length() - 1) // 8, LEAST_STEP)
    step = max(step // multiple, 1) * multiple
    return min(-(-needed // step) * step, batch_size)


def in_batches(
    function: Callable[..., Any], arrays: tuple[np.ndarray, ...], size: int
) -> np.ndarray:
    """``function`` over the rows of the arrays, ``size`` at a time; the last ones are padded."""
    rows = len(arrays[0])
    results = []
    for begin in range(0, rows, size):
        at = np.minimum(np.arange(begin, begin + size), rows - 1)
        results.append(whole(function(*(a[at] for a in arrays))))
    return np.concatenate(results)[:rows]
