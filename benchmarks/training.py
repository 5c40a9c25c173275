"""Training: an AdvMoE step against the passes it is made of, and against PyTorch."""

import statistics
from collections.abc import Iterator

import jax

from advmoe_jax.training.state import create_state
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
from benchmarks.timing import Compiled, Timing, alternate, compiled, matrix_product, ratio

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
    if against_torch.available():
        calls |= against_torch.training_calls(batch)
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
    if "torch step" in times:
        gpu = jax.default_backend() == "gpu"
        if gpu:
            yield from _in_bfloat16(batch, calls)
        yield Figure(
            SUITE,
            f"{NETWORK}, batch {batch}: eager PyTorch AdvMoE step over ours",
            ratio(times["torch step"], times["step"]),
            None if gpu else 1.3,
            at_least=True,
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


def _weighted(times: dict[str, Timing]) -> Iterator[tuple[float, ...]]:
    for part in ("pathway", "router"):
        for name, count in CALLS.items():
            yield tuple(count * s for s in times[f"{part} {name}"].seconds)


def _in_bfloat16(batch: int, calls: dict) -> Iterator[Figure]:
    images, labels = random_batch(batch)
    bound = moe(NETWORK, images, dtype="bfloat16")
    ours = {"step": _step(bound, images, labels).call, "torch step": calls["torch step"]}
    times = alternate(ours)
    yield Figure(
        SUITE,
        f"{NETWORK}, batch {batch}: eager PyTorch AdvMoE step over ours in bfloat16",
        ratio(times["torch step"], times["step"]),
        4.0,
        at_least=True,
    )


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
