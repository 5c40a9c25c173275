"""Attacks: one compiled loop against one call a step."""

from collections.abc import Iterator

import jax

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.evaluation.timing import alternate, ratio
from benchmarks.figures import Figure
from benchmarks.networks import EPSILON, dense, infer, moe, random_batch
from benchmarks.programs import Compiled, compiled

SUITE, NETWORK, STEPS, STEP_SIZE = "attack", "resnet18_cifar", 20, 2 / 255


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
