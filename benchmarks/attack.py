"""Attacks: one compiled loop against one call a step."""

from collections.abc import Iterator
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.evaluation.timing import alternate, ratio
from benchmarks.figures import Figure
from benchmarks.networks import EPSILON, dense, infer, moe, random_batch
from benchmarks.programs import Compiled, compiled

SUITE, NETWORK, STEPS, STEP_SIZE = "attack", "resnet18_cifar", 20, 2 / 255
# A network that is not this package's: convolutions of JAX, of so many channels each.
_CHANNELS = (3, 64, 64, 64, 64, 10)
_LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


def figures(batch: int) -> Iterator[Figure]:
    """Rows on ``batch`` images."""
    images, labels = random_batch(batch)
    key = jax.random.key(0)
    networks = {"moe": moe(NETWORK, images), "dense": dense(NETWORK)}

    def program(name: str, num_steps: int) -> Compiled:
        bound = networks[name]
        attack = pgd(linf(EPSILON), num_steps=num_steps, step_size=STEP_SIZE, start="none")

        def run(params: dict, x: jax.Array) -> jax.Array:
            return attack(lambda x: infer(bound, params, x).logits, x, labels, key)

        return compiled(run, bound.params, images)

    loop, single = program("moe", STEPS), program("moe", 1)
    of_dense = program("dense", 1)

    def separately() -> jax.Array:
        for _ in range(STEPS):
            out = single.call()
        return out

    for layout in _LAYOUTS:
        yield _of_others(layout, images, labels)
    times = alternate({"loop": loop.call, "separate": separately}, repeats=3)
    yield Figure(
        SUITE,
        f"{NETWORK} MoE, batch {batch}: PGD-{STEPS} in one loop over {STEPS} jitted steps",
        ratio(times["loop"], times["separate"]),
        1.1,
        memory=loop.mebibytes,
    )
    times = alternate({"moe": single.call, "dense": of_dense.call})
    yield Figure(
        SUITE,
        f"{NETWORK}, batch {batch}: a PGD step on the MoE over one on dense",
        ratio(times["moe"], times["dense"]),
        macs=networks["moe"].macs / networks["dense"].macs,
        memory=single.mebibytes,
    )


def _of_others(layout: str, images: jax.Array, labels: jax.Array) -> Figure:
    """PGD in a loop over as many steps by themselves, on a plain JAX function."""
    sizes = list(pairwise(_CHANNELS))
    kernels = [
        0.1 * jax.random.normal(jax.random.key(i), (3, 3, *size)) for i, size in enumerate(sizes)
    ]

    def network(kernels: list[jax.Array], x: jax.Array) -> jax.Array:
        is_first = layout == "NCHW"
        x = x.transpose(0, 3, 1, 2) if is_first else x
        for kernel in kernels:
            kernel = kernel.transpose(3, 2, 0, 1) if is_first else kernel
            numbers = _LAYOUTS[layout]
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            x = jnp.maximum(x, 0)
        return x.mean((2, 3) if is_first else (1, 2))

    def program(num_steps: int) -> Compiled:
        attack = pgd(linf(EPSILON), num_steps=num_steps, step_size=STEP_SIZE, start="none")
        key = jax.random.key(0)
        return compiled(
            lambda kernels, x: attack(lambda x: network(kernels, x), x, labels, key),
            kernels,
            images,
        )

    loop, single = program(STEPS), program(1)

    def separately() -> jax.Array:
        for _ in range(STEPS):
            out = single.call()
        return out

    times = alternate({"loop": loop.call, "separate": separately}, repeats=3)
    return Figure(
        SUITE,
        f"a plain JAX network in {layout}, batch {len(images)}: PGD-{STEPS} in one loop over "
        f"{STEPS} jitted steps",
        ratio(times["loop"], times["separate"]),
        1.1,
        memory=loop.mebibytes,
    )
