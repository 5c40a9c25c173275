"""Measures what ``auto`` dispatch asks of a platform: the time of a row, by its block's size.

    python -m benchmarks.row_costs                  # prints the table of this machine's platform
    python -m benchmarks.row_costs --write          # and writes it where dispatch reads it

Two experts take half of the images each; a pass is timed, and divided by the rows it computes.
Tokens are not measured: what the table says of them stays.
"""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.timing import alternate
from advmoe_jax.files import write_json
from advmoe_jax.routing import dispatch
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Tree
from benchmarks.networks import Bound, gradients, random_batch, untrained
from benchmarks.programs import compiled

TABLE = Path(dispatch.__file__).with_name("row_costs.json")
EXPERTS = 2
MODES = {"image": False, "image in training": True}

NETWORK = flags.DEFINE_string("network", "resnet18_cifar", "the network, by name")
BATCH = flags.DEFINE_integer("batch_size", 1024, "images")
BLOCKS = flags.DEFINE_list("blocks", ["16", "32", "64", "128", "256", "512"], "sizes of blocks")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the computation")
REPEATS = flags.DEFINE_integer("repeats", 15, "rounds of timing")
WRITE = flags.DEFINE_boolean("write", False, "write the table where dispatch reads it")
TO = flags.DEFINE_string("to", str(TABLE), "the table to write to")


def main() -> None:
    """Measures both modes, prints the table, and writes it if asked to."""
    sizes = [int(size) if size.isdigit() else 0 for size in BLOCKS.value]
    if not sizes or min(sizes) < 1:
        raise UserError(f"--blocks={','.join(BLOCKS.value)}: give positive numbers")
    if BATCH.value < EXPERTS * max(sizes):
        raise UserError(
            f"--batch_size={BATCH.value} does not fill a block of {max(sizes)} for each of "
            f"{EXPERTS} experts; give at least {EXPERTS * max(sizes)}"
        )
    found = {mode: _relative(_times(train, sizes)) for mode, train in MODES.items()}
    device = jax.devices()[0]
    note = (
        f"measured on one {device.device_kind}, {NETWORK.value}, {DTYPE.value}, {BATCH.value} "
        f"images, jax {importlib.metadata.version('jax')}"
    )
    table = {"found": note, **found}
    Console(width=120).print_json(json.dumps({device.platform: table}))
    if WRITE.value:
        whole = json.loads(TABLE.read_text())
        old = whole.get(device.platform, whole["gpu"])
        write_json(Path(TO.value), whole | {device.platform: {"token": old["token"], **table}})


def _times(train: bool, sizes: list[int]) -> dict[str, float]:
    """Seconds of one row, by the size of its block and for ``every``."""
    images, _ = random_batch(BATCH.value)
    indices = (jnp.arange(BATCH.value) % EXPERTS).astype(jnp.int32)[:, None, None]
    programs, rows = {}, {}
    for size in [*sizes, 0]:
        name = str(size) if size else "every"
        strategy = {"dispatch": "blocks", "block_size": size} if size else {"dispatch": "every"}
        settings = {"num_experts": EXPERTS, "ratio": 0.5, "dtype": DTYPE.value}
        bound = untrained(NETWORK.value, router="narrow_at_8", **settings, **strategy)
        programs[name] = compiled(_pass(bound, train), bound.params, images, indices).call
        of_expert = BATCH.value // EXPERTS
        rows[name] = EXPERTS * (-(-of_expert // size) * size if size else BATCH.value)
    times = alternate(programs, repeats=REPEATS.value)
    return {name: timing.median / rows[name] for name, timing in times.items()}


def _pass(bound: Bound, train: bool) -> Callable[[Tree, Array, Array], Any]:
    def logits(params: Tree, images: Array, indices: Array) -> Array:
        routing = Routing(indices, jnp.ones(indices.shape))
        apply = bound.network.apply
        return apply(params, bound.stats, images, routing=routing, train=train)[0].logits

    if not train:
        return logits
    return lambda params, images, indices: gradients(lambda p: logits(p, images, indices))(params)


def _relative(seconds: Mapping[str, float]) -> dict[str, float]:
    """Beside the fastest block's, to three digits."""
    least = min(time for name, time in seconds.items() if name != "every")
    return {name: float(f"{time / least:.3g}") for name, time in seconds.items()}


if __name__ == "__main__":
    cli.run(main, needs=())
