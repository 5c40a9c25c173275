"""What a training step of a V-MoE with spread experts sends, by the TPU's own compiler.

    pip install -e '.[tpu_aot]'
    python -m benchmarks.collectives

Compiles an adversarial training step of a small V-MoE for 2 x 2 chips, two expert shards, and
prints its collectives beside what docs/scaling.md counts. No TPU is needed.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from advmoe_jax import cli, target
from advmoe_jax.attacks import linf, pgd
from advmoe_jax.models import Network, ViT, functional
from advmoe_jax.parallel import (
    batch_axes,
    batch_spec,
    distributed_shapes,
    parallel,
    state_specs,
)
from advmoe_jax.routing.exchange import seats
from advmoe_jax.training import Settings, TrainState, create_state, create_step
from benchmarks import hlo
from benchmarks.tpu import mesh_of

SHARDS, STEPS, BLOCKS, TOKENS, WIDTH = 2, 2, 2, 5, 128
IMAGES = flags.DEFINE_integer("images", 16, "images a chip")


def main() -> None:
    """Compiles the step, and prints what it sends, and what it should."""
    chips = mesh_of("v5e:2x2", 4).devices
    mesh = Mesh(np.reshape(chips, (-1, SHARDS)), batch_axes(SHARDS))
    network, state, compiled = _compiled(mesh)
    found = hlo.collectives(hlo.parse(compiled))
    console = Console()
    for kind, (count, size) in found.items():
        console.print(f"{kind}: {count}, {size:,} bytes; loops of later rounds count once")
    of_step = (4 * STEPS + 6) * BLOCKS
    size = seats(IMAGES.value * TOKENS, SHARDS) * SHARDS * WIDTH * jnp.dtype(jnp.bfloat16).itemsize
    console.print(f"expected of tokens: {of_step} all-to-alls of {size:,} bytes in first rounds")
    specs = state_specs(state.params, network.expert_parameters, mesh)
    bytes_of = {False: 0, True: 0}
    for leaf, spec in zip(jax.tree.leaves(state.params), jax.tree.leaves(specs), strict=True):
        bytes_of[bool(spec)] += leaf.nbytes // (SHARDS if spec else 1)
    whole, own = bytes_of[False], bytes_of[True]
    console.print(f"expected of gradients: all-reduces of {whole:,} and {own:,} bytes")


def _compiled(mesh: Mesh) -> tuple[Network, TrainState, str]:
    size = {"layers": BLOCKS, "width": WIDTH, "hidden": 256, "heads": 2, "patch": 4}
    vit = ViT("vit_tiny_8", num_experts=4, placement="0,1", dtype="bfloat16", **size)
    network, params, stats = functional(vit.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0)))
    optimizers = dict.fromkeys(network.parts, optax.sgd(0.1, 0.9))
    attack = pgd(linf(0.1), num_steps=STEPS, step_size=0.05, loss="cross_entropy", start="uniform")
    step = create_step("at", network, optimizers, attack, Settings(), mesh.axis_names)
    state = create_state(params, stats, optimizers)
    specs, rows = state_specs(state, network.expert_parameters, mesh), batch_spec(mesh)
    count = IMAGES.value * mesh.size
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    batch = (
        jax.ShapeDtypeStruct((count, 8, 8, 1), jnp.float32),
        jax.ShapeDtypeStruct((count,), jnp.int32),
        keys,
    )
    spread = NamedSharding(mesh, rows)
    batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread) for x in batch]
    mapped = parallel(
        step, mesh, in_specs=(specs, rows, rows, rows), out_specs=(specs, PartitionSpec())
    )
    with target.traced_for("tpu"):
        traced = mapped.trace(distributed_shapes(state, specs, mesh), *batch)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return network, state, compiled.as_text()


if __name__ == "__main__":
    cli.run(main, needs=())
