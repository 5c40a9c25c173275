"""Asks the TPU's own compiler what programs would take; no TPU is needed.

    pip install -e '.[tpu_aot]'
    python -m benchmarks.tpu
    python -m benchmarks.tpu --programs=dense,moe --batch_size=2048 --num_experts=8 --router=at_8
    python -m benchmarks.tpu --programs=dense,moe_blocks --block_size=64 --batch_size=128
    python -m benchmarks.tpu --programs=train_dense,train_moe --topology=v5e:2x2 --chips=4
    python -m benchmarks.tpu --programs=step_dense,step_moe --batch_size=128 --router=at_8

Cycles are the compiler's own estimates; nothing here is measured. What was compiled is kept in
``--cache`` by its source, so that a change compiles what it changed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from advmoe_jax import cli, target
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import count_macs
from advmoe_jax.files import write_json as keep
from advmoe_jax.models import PRESETS
from advmoe_jax.parallel import DATA_AXIS, parallel
from advmoe_jax.training import create_state
from benchmarks import hlo
from benchmarks.figures import Figure, table, write_json
from benchmarks.networks import Bound, advmoe_step, infer, train, untrained

# Floating-point operations of a chip's matrix units in one cycle: units x side x side x 2.
PER_CYCLE = {"v5e": 4 * 128 * 128 * 2, "v6e": 2 * 256 * 256 * 2}
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "pathway": {"ratio": 0.5},
    "moe": {"ratio": 0.5, "dispatch": "auto"},
    "moe_blocks": {"ratio": 0.5, "dispatch": "blocks"},
    "moe_every": {"ratio": 0.5, "dispatch": "every"},
}
# A pass of inference; forward and backward in training mode; a whole step of TRADES or AdvMoE.
KINDS = ("", "train_", "step_")
NAMES = tuple(f"{kind}{name}" for kind in KINDS for name in NETWORKS)

PROGRAMS = flags.DEFINE_list("programs", list(NETWORKS), f"of {', '.join(NAMES)}")
NETWORK = flags.DEFINE_string("network", "resnet18_cifar", "the network, by name")
SIZE = flags.DEFINE_integer("image_size", 32, "pixels of an image's side")
CLASSES = flags.DEFINE_integer("num_classes", 10, "of the network's answers")
BATCH = flags.DEFINE_integer("batch_size", 512, "images a chip")
EXPERTS = flags.DEFINE_integer("num_experts", 2, "of the mixtures")
BLOCK = flags.DEFINE_integer("block_size", 128, "images a block of moe_blocks")
ROUTER = flags.DEFINE_enum(
    "router", "", ["", *PRESETS], "of the mixtures; empty: what the network has by default"
)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the computation")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "kind and arrangement of the chips")
CHIPS = flags.DEFINE_integer("chips", 1, "how many of them the batch is split over")
CACHE = flags.DEFINE_string("cache", "", "directory of what was compiled; empty: in the user's")
JSON = flags.DEFINE_string("json", "", "file to write the figures to")
SHOW = flags.DEFINE_integer("show", 10, "how many of the dearest instructions to print of each")


class Estimate(NamedTuple):
    """What the compiler says of one program, a chip.

    Attributes:
        seconds: it took to compile.
        cycles: estimated, loops multiplied out.
        unknown_loops: that count once.
        flops: twice the multiply-accumulates of what was traced.
        memory: bytes of temporaries, arguments and outputs.
        collectives: by kind, number and bytes.
        dearest: where the cycles go: cycles, how often, opcode, operation, source line.
    """

    seconds: float
    cycles: int
    unknown_loops: int
    flops: int
    memory: int
    collectives: dict[str, list[int]]
    dearest: list[list[Any]]


def main() -> None:
    """Compiles the programs that the flags ask for, and prints what the compiler says."""
    for name in PROGRAMS.value:
        if name not in NAMES:
            raise UserError(f"--programs={name} is unknown; choose from {', '.join(NAMES)}")
    for flag in (SIZE, CLASSES, BATCH, EXPERTS, BLOCK, CHIPS):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be positive")
    mesh = mesh_of(TOPOLOGY.value, CHIPS.value)
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    machine = {
        "estimated_for": TOPOLOGY.value,
        "chips": CHIPS.value,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    where = (
        f"{TOPOLOGY.value}, {CHIPS.value} of its chips, {DTYPE.value}, {BATCH.value} images each"
    )
    console.print(f"estimated by the compiler, not measured: {where}", highlight=False)
    found: list[Figure] = []
    estimates: dict[str, Estimate] = {}
    for name in PROGRAMS.value:
        with console.status(f"compiling {name}"):
            estimates[name] = estimate(name, mesh)
        _print_dearest(name, estimates[name], console)
        found = list(figures(estimates))
        if JSON.value:  # after every program, so that an interrupted run keeps what it has
            write_json(Path(JSON.value), machine, found)
    console.print(table(f"estimates, {NETWORK.value}", found))


def mesh_of(topology: str, chips: int) -> Mesh:
    """The first ``chips`` of a topology, such as ``v5e:2x2``, as the mesh of a data-parallel run.

    Raises:
        UserError: if the compiler is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU's compiler is not installed: pip install -e '.[tpu_aot]'")
    # It asks for a machine's own TPU otherwise, and waits for an answer.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever the compiler's library raises
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"--topology={topology} cannot be had: {reason}") from None
    if chips > len(devices):
        raise UserError(f"--chips={chips}, but {topology} has {len(devices)}")
    return Mesh(np.array(devices[:chips]), (DATA_AXIS,))


def estimate(name: str, mesh: Mesh) -> Estimate:
    """What the compiler says of a program of ``NAMES``; from the cache if it is there."""
    function, args = _program(name, mesh)
    with target.traced_for("tpu"):
        traced = jax.jit(function).trace(*args)
    lowered = traced.lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    versions = [importlib.metadata.version(package) for package in ("jax", "libtpu")]
    owner = json.dumps([text, TOPOLOGY.value, mesh.size, *versions])
    folder = Path(CACHE.value) if CACHE.value else Path.home() / ".cache" / "advmoe_jax" / "tpu"
    file = folder / f"{hashlib.sha256(owner.encode()).hexdigest()}.json"
    if file.is_file():
        return Estimate(**json.loads(file.read_text()))
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    program, memory = hlo.parse(compiled.as_text()), compiled.memory_analysis()
    found = Estimate(
        seconds,
        hlo.cycles(program),
        hlo.unknown_loops(program),
        2 * count_macs(function, *args) // mesh.size,
        memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes,
        {kind: list(counts) for kind, counts in hlo.collectives(program).items()},
        [
            [total, times, i.opcode, i.operation, program.lines.get(i.frame, "")]
            for i, times, total in hlo.dearest(program, 20)
        ],
    )
    folder.mkdir(parents=True, exist_ok=True)
    keep(file, found._asdict())
    return found


def _program(name: str, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function, and the shapes of its arguments on the mesh."""
    kind = name.removeprefix("train_").removeprefix("step_")
    experts = EXPERTS.value if kind.startswith("moe") else 1
    settings = dict(NETWORKS[kind], num_experts=experts, dtype=DTYPE.value)
    if kind == "moe_blocks":
        settings["block_size"] = BLOCK.value
    answers = {"size": SIZE.value, "classes": CLASSES.value}
    bound = untrained(NETWORK.value, router=ROUTER.value, **answers, **settings)
    shape = (BATCH.value * mesh.size, SIZE.value, SIZE.value, 3)
    images = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    )
    if name.startswith("step_"):
        return _step(bound, mesh, images)
    params, stats = _replicated((bound.params, bound.stats), mesh)
    is_training = name.startswith("train_")

    def local(params: Any, stats: Any, images: Any) -> Any:
        here = Bound(bound.network, params, stats, bound.macs)
        if not is_training:
            return infer(here, params, images).logits

        def loss(params: Any) -> Any:
            return jnp.sum(jnp.square(train(here, params, images))) / (len(images) * CLASSES.value)

        return jax.lax.pmean(jax.grad(loss)(params), DATA_AXIS)

    out = PartitionSpec() if is_training else PartitionSpec(DATA_AXIS)
    specs = (PartitionSpec(), PartitionSpec(), PartitionSpec(DATA_AXIS))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return mapped, (params, stats, images)


def _step(
    bound: Bound, mesh: Mesh, images: jax.ShapeDtypeStruct
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole training step: attacks, gradients, updates."""
    step, optimizers = advmoe_step(bound.network, DATA_AXIS)
    state = _replicated(create_state(bound.params, bound.stats, optimizers), mesh)
    labels, keys = jax.eval_shape(
        lambda: (
            jnp.zeros(images.shape[0], jnp.int32),
            jax.random.split(jax.random.key(0), images.shape[0]),
        )
    )
    everywhere, spread = PartitionSpec(), PartitionSpec(DATA_AXIS)
    of_batch = NamedSharding(mesh, spread)
    batch = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_batch) for x in (labels, keys)]
    mapped = parallel(step, mesh, in_specs=(everywhere, spread, spread, spread))
    return mapped, (state, images, *batch)


def _replicated(tree: Any, mesh: Mesh) -> Any:
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def figures(estimates: dict[str, Estimate]) -> Iterator[Figure]:
    """Rows of what was estimated, each beside the dense network's if that is there."""
    kind = TOPOLOGY.value.split(":")[0]
    for name, found in estimates.items():
        peak = None
        if kind in PER_CYCLE and found.cycles:
            peak = found.flops / found.cycles / PER_CYCLE[kind]
        title = f"{name}, N = {EXPERTS.value}" if "moe" in name else name
        title += f", blocks of {BLOCK.value}" if "moe_blocks" in name else ""
        memory = found.memory / 2**20
        megacycles = found.cycles / 1e6
        yield Figure("tpu", title, megacycles, unit="Mcycles", peak=peak, memory=memory)
        yield Figure("tpu", f"{title}: compiling", found.seconds, unit="s")
        if found.unknown_loops:
            title_of_loops = f"{title}: loops that count once"
            yield Figure("tpu", title_of_loops, found.unknown_loops, unit="loops")
        for collective, (number, size) in found.collectives.items():
            title_of = f"{title}: {number} x {collective}"
            yield Figure("tpu", title_of, size / 2**20, unit="MiB")
        beside = next(k for k in reversed(KINDS) if name.startswith(k)) + "dense"
        if name != beside and beside in estimates:
            dense = estimates[beside]
            ratio, macs = found.cycles / dense.cycles, found.flops / dense.flops
            yield Figure("tpu", f"{title} over {beside}", ratio, macs=macs)


def _print_dearest(name: str, found: Estimate, console: Console) -> None:
    if not SHOW.value:
        return
    console.print(f"\n{name}: {found.cycles / 1e6:.2f} Mcycles, of these", highlight=False)
    for total, times, opcode, operation, line in found.dearest[: SHOW.value]:
        where = "/".join(Path(line).parts[-2:])
        share = f"{total / max(found.cycles, 1):6.1%}"
        text = f"{share}  {times:4} x {opcode:12} {operation[-60:]:60} {where}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, needs=())
