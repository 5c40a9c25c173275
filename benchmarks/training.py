"""Training: an AdvMoE step against the passes it is made of, and against PyTorch."""

import statistics
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, PartitionSpec

from advmoe_jax.evaluation.timing import Call, Timing, alternate, ratio
from advmoe_jax.parallel import DATA_AXIS, data_mesh, parallel, replicate
from advmoe_jax.training import create_state
from benchmarks import against_torch
from benchmarks.figures import Figure
from benchmarks.networks import (
    Bound,
    advmoe_step,
    dense,
    gradients,
    moe,
    random_batch,
)
from benchmarks.programs import Compiled, compiled, matrix_product

SUITE, NETWORK = "training", "resnet18_cifar"
# Of one AdvMoE step with two attack steps: 2 + 2 x 4 + 3 x 2 = 16 passes, and as many of the
# router. A gradient's call makes the forward pass too.
CALLS = {"inference": 2, "input gradient": 4, "update": 2}


def figures(batch: int) -> Iterator[Figure]:
    """Rows on ``batch`` images."""
    images, labels = random_batch(batch)
    bound = moe(NETWORK, images)
    step = _step(bound, images, labels)
    pathway = dense(NETWORK, ratio=0.5)
    passes = {f"pathway {name}": c for name, c in _passes(pathway, images, False).items()}
    passes |= {f"router {name}": c for name, c in _passes(bound, images, True).items()}
    product, product_macs = matrix_product()
    calls = {name: c.call for name, c in {"step": step, **passes}.items()} | {"product": product}
    times = alternate(calls, repeats=5, seconds=90)

    whole = Timing(tuple(map(sum, zip(*_weighted(times), strict=True))))
    macs = 16 * bound.macs * batch
    yield Figure(
        SUITE,
        f"{NETWORK}, batch {batch}: AdvMoE step over 16 passes of a plain pathway and router",
        ratio(times["step"], whole),
        1.2,
        peak=macs / times["step"].median / (product_macs / times["product"].median),
        memory=step.mebibytes,
    )
    yield Figure(
        SUITE,
        f"{NETWORK}, batch {batch}: update pass over inference pass of a pathway",
        ratio(times["pathway update"], times["pathway inference"]),
    )
    yield Figure(
        SUITE,
        f"{NETWORK}, batch {batch}: compiling the AdvMoE step over running it",
        step.compile_seconds / statistics.median(times["step"].seconds),
    )
    if against_torch.available():
        yield from _over_torch(batch)


def _weighted(times: dict[str, Timing]) -> Iterator[tuple[float, ...]]:
    for part in ("pathway", "router"):
        for name, count in CALLS.items():
            yield tuple(count * s for s in times[f"{part} {name}"].seconds)


def _over_torch(batch: int) -> Iterator[Figure]:
    """Ours on all that the machine has: on CPU, XLA keeps all cores busy with a device for each."""
    images, labels = random_batch(batch)
    is_gpu = jax.default_backend() == "gpu"
    mesh = data_mesh()
    ours = {"float32": moe(NETWORK, images)}
    if is_gpu:
        ours["bfloat16"] = moe(NETWORK, images, dtype="bfloat16")
    calls = {name: _parallel_step(bound, mesh, images, labels) for name, bound in ours.items()}
    times = alternate(calls | against_torch.training_calls(batch), repeats=5, seconds=90)
    for dtype in ours:
        for theirs, passes in (
            ("torch published", "the published passes"),
            ("torch lean", "our passes, every expert"),
        ):
            bar = None
            if theirs == "torch published" and is_gpu == (dtype == "bfloat16"):
                bar = 4.0 if is_gpu else 1.3
            yield Figure(
                SUITE,
                f"{NETWORK}, batch {batch}: eager PyTorch AdvMoE step ({passes}) over ours in"
                f" {dtype} on {mesh.size} device(s)",
                ratio(times[theirs], times[dtype]),
                bar,
                at_least=True,
            )


def _parallel_step(bound: Bound, mesh: Mesh, images: jax.Array, labels: jax.Array) -> Call:
    step, optimizers = advmoe_step(bound.network, DATA_AXIS)
    everywhere, spread = PartitionSpec(), PartitionSpec(DATA_AXIS)
    run = parallel(step, mesh, in_specs=(everywhere, spread, spread, spread))
    state = replicate(create_state(bound.params, bound.stats, optimizers), mesh)
    keys = jax.random.split(jax.random.key(0), len(images))
    return lambda: run(state, images, labels, keys)


def _step(bound: Bound, images: jax.Array, labels: jax.Array) -> Compiled:
    step, optimizers = advmoe_step(bound.network)
    state = create_state(bound.params, bound.stats, optimizers)
    keys = jax.random.split(jax.random.key(0), len(images))
    return compiled(step, state, images, labels, keys)


def _passes(bound: Bound, images: jax.Array, router: bool) -> dict[str, Compiled]:
    """The three kinds of calls that a step makes, of the backbone or of the router alone."""

    def forward(params: dict, x: jax.Array, train: bool) -> jax.Array:
        if router:
            return bound.network.route(params, bound.stats, x, train=train)[0].scores
        return bound.network.apply(params, bound.stats, x, train=train)[0].logits

    def to_input(params: dict, x: jax.Array) -> jax.Array:
        return gradients(lambda x: forward(params, x, False))(x)

    def update(params: dict, x: jax.Array) -> dict:
        return gradients(lambda p: forward(p, x, True))(params)

    of = (bound.params, images)
    return {
        "inference": compiled(lambda p, x: forward(p, x, False), *of),
        "input gradient": compiled(to_input, *of),
        "update": compiled(update, *of),
    }
