"""Inference: the MoE against the dense network, and both against PyTorch."""

from collections.abc import Iterator

import jax

from advmoe_jax.evaluation.timing import alternate, ratio
from benchmarks import against_torch
from benchmarks.figures import Figure
from benchmarks.networks import dense, infer, moe, random_batch
from benchmarks.programs import compiled, matrix_product

SUITE = "inference"
BARS = {
    "resnet18_cifar": 0.42,
    "vgg16_bn": 0.55,
    "densenet_cifar": 0.55,
    "wrn_28_10_cifar": 0.55,
}


def figures(batch: int) -> Iterator[Figure]:
    """Rows for each architecture, then the rows against PyTorch."""
    for name, bar in BARS.items():
        yield from _over_dense(name, bar, batch)
    yield from _against_torch(batch)


def _over_dense(name: str, bar: float, batch: int) -> Iterator[Figure]:
    images, _ = random_batch(batch)
    networks = {"dense": dense(name), "moe": moe(name, images), "pathway": dense(name, ratio=0.5)}
    programs = {
        key: compiled(lambda p, x, b=bound: infer(b, p, x).logits, bound.params, images)
        for key, bound in networks.items()
    }
    product, product_macs = matrix_product()
    calls = {key: program.call for key, program in programs.items()} | {"product": product}
    times = alternate(calls)
    peak = product_macs / times["product"].median

    def figure(key: str, words: str, bar: float | None) -> Figure:
        return Figure(
            SUITE,
            f"{name}, batch {batch}: {words}",
            ratio(times[key], times["dense"]),
            bar,
            macs=networks[key].macs / networks["dense"].macs,
            peak=networks[key].macs * batch / times[key].median / peak,
            memory=programs[key].mebibytes,
        )

    yield figure("moe", "MoE (N = 2, half width, router) over dense", bar)
    yield figure("pathway", "one pathway alone over dense", None)
    yield figure("dense", "dense over itself", None)


def _against_torch(batch: int) -> Iterator[Figure]:
    if not against_torch.available():
        return
    images, _ = random_batch(batch)
    networks = {"dense": dense("resnet18_cifar"), "moe": moe("resnet18_cifar", images)}
    calls = {
        key: compiled(lambda p, x, b=bound: infer(b, p, x).logits, bound.params, images).call
        for key, bound in networks.items()
    }
    calls |= against_torch.inference_calls(batch)
    times = alternate(calls)
    where = f"resnet18_cifar, batch {batch}, {jax.default_backend()}"
    for ours, theirs in (
        ("moe", "torch moe"),
        ("moe", "torch dense"),
        ("dense", "torch dense"),
    ):
        yield Figure(
            SUITE,
            f"{where}: our {ours} over eager {theirs}",
            ratio(times[ours], times[theirs]),
        )
    yield Figure(
        SUITE,
        f"{where}: eager torch moe over eager torch dense",
        ratio(times["torch moe"], times["torch dense"]),
    )
