"""Dispatch: what more experts cost, and what each strategy costs."""

from collections.abc import Iterator

from advmoe_jax.evaluation.timing import alternate, ratio
from benchmarks.figures import Figure
from benchmarks.networks import Bound, gradients, infer, moe, random_batch, train
from benchmarks.programs import Compiled, compiled

SUITE, NETWORK = "dispatch", "resnet18_cifar"


def figures(batch: int, large_batch: int) -> Iterator[Figure]:
    """Rows on ``large_batch`` images for the number of experts, on ``batch`` for strategies."""
    yield from _experts(large_batch)
    yield from _strategies(batch)


def _experts(batch: int) -> Iterator[Figure]:
    images, _ = random_batch(batch)
    networks = {n: moe(NETWORK, images, n) for n in (2, 8, 16)}
    programs = {str(n): _inference(bound, images) for n, bound in networks.items()}
    times = alternate({name: p.call for name, p in programs.items()})
    for n, bar in ((8, 1.2), (16, 1.35)):
        yield Figure(
            SUITE,
            f"inference, batch {batch}: N = {n} over N = 2",
            ratio(times[str(n)], times["2"]),
            bar,
            macs=networks[n].macs / networks[2].macs,
            memory=programs[str(n)].mebibytes,
        )
    programs = {str(n): _training(networks[n], images) for n in (2, 8)}
    times = alternate({name: p.call for name, p in programs.items()}, repeats=5)
    yield Figure(
        SUITE,
        f"training mode, forward + backward, batch {batch}: N = 8 over N = 2",
        ratio(times["8"], times["2"]),
        1.3,
        macs=networks[8].macs / networks[2].macs,
        memory=programs["8"].mebibytes,
    )


def _strategies(batch: int) -> Iterator[Figure]:
    images, _ = random_batch(batch)
    for n in (2, 8):
        networks = {
            "auto": moe(NETWORK, images, n),
            "every expert": moe(NETWORK, images, n, dispatch="every"),
            **{
                f"blocks of {size}": moe(NETWORK, images, n, dispatch="blocks", block_size=size)
                for size in (8, 32)
            },
        }
        programs = {name: _inference(bound, images) for name, bound in networks.items()}
        times = alternate({name: p.call for name, p in programs.items()})
        for name in list(networks)[1:]:
            yield Figure(
                SUITE,
                f"inference, batch {batch}, N = {n}: {name} over auto",
                ratio(times[name], times["auto"]),
                memory=programs[name].mebibytes,
            )


def _inference(bound: Bound, images: object) -> Compiled:
    return compiled(lambda p, x: infer(bound, p, x).logits, bound.params, images)


def _training(bound: Bound, images: object) -> Compiled:
    return compiled(lambda p, x: gradients(lambda q: train(bound, q, x))(p), bound.params, images)
