"""Every kind of network takes a step on real images: ``python -m studies.architectures``.

Narrow ResNets, wide ResNets, VGGs and DenseNets, in their forms for CIFAR and for ImageNet, on a
few images of CIFAR-10, of Tiny-ImageNet, and of Tiny-ImageNet enlarged to 224x224 pixels. After one
step of AdvMoE all numbers are finite, the router and the experts have moved, and every image has
been sent somewhere. ``--data`` names the folder with ``cifar10_jpeg.tar.gz`` and
``tiny-imagenet-21.tar.gz``.

Takes about ten minutes on two CPU cores (an estimate), nearly all of it compilation.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from advmoe_jax import cli
from advmoe_jax.attacks import linf, pgd
from advmoe_jax.data import Split, load
from advmoe_jax.errors import UserError
from advmoe_jax.models import CNN, RouterSettings, functional
from advmoe_jax.training import Settings, create_state, create_step
from advmoe_jax.types import Images, Labels
from studies.bars import Bar, conclude

DATA = flags.DEFINE_string("data", os.environ.get("ADVMOE_DATA", ""), "folder with the archives")
NETWORKS = flags.DEFINE_string("networks", "", "comma-separated names; empty: all")
BATCH, LARGE = 4, 224
# The width of the first convolution, which is as published or wider than a study needs.
WIDTHS = {"resnet18": 8, "wrn_28_10": 2, "vgg16": 8, "densenet": 8}
CIFAR_FORMS = ("resnet18_cifar", "wrn_28_10_cifar", "vgg16_bn", "densenet_cifar")
IMAGENET_FORMS = ("resnet18_imagenet", "wrn_28_10_imagenet", "densenet_imagenet")
CASES = (
    *((name, "cifar10", 0) for name in CIFAR_FORMS),
    *((name, "tiny_imagenet", 0) for name in CIFAR_FORMS),
    *((name, "tiny_imagenet", LARGE) for name in IMAGENET_FORMS),
)


def main() -> None:
    """One step of every network."""
    wanted = tuple(filter(None, NETWORKS.value.split(",")))
    for name in wanted:
        if name not in CIFAR_FORMS + IMAGENET_FORMS:
            valid = ", ".join(CIFAR_FORMS + IMAGENET_FORMS)
            raise UserError(f"--networks={name} is unknown; choose of {valid}")
    if not Path(DATA.value, "cifar10_jpeg.tar.gz").exists():
        raise UserError(f"--data={DATA.value} has no cifar10_jpeg.tar.gz: name a folder that has")
    cases = [case for case in CASES if not wanted or case[0] in wanted]
    conclude("one step of AdvMoE", [bar for case in cases for bar in bars_of(*case)])


def bars_of(name: str, source: str, size: int) -> Iterator[Bar]:
    """What must hold after a step of a network on images of ``size`` pixels (0: as they are)."""
    images, labels = images_of(source, size)
    about = f"{name}, {source}, {images.shape[1]} pixels"
    resolution = 0 if source == "cifar10" else 32
    cnn = CNN(
        name,
        num_experts=2,
        ratio=0.5,
        width=next(width for family, width in WIDTHS.items() if name.startswith(family)),
        block_size=2,
        router=RouterSettings(width=4, blocks=1, resolution=resolution),
    )
    model = cnn.create(in_channels=3, num_classes=21, rngs=nnx.Rngs(0))
    network, params, stats = functional(model)
    optimizers = {part: optax.sgd(0.1) for part in network.parts}
    attack = pgd(linf(8 / 255), num_steps=1, step_size=5 / 255, loss="kl", start="gaussian")
    step = jax.jit(create_step("advmoe", network, optimizers, attack, Settings()))
    before = create_state(params, stats, optimizers)
    keys = jax.random.split(jax.random.key(0), len(labels))
    after, metrics = step(before, images, labels, keys)
    infinite = sum(int(jnp.sum(~jnp.isfinite(x))) for x in jax.tree.leaves((after, metrics)))
    yield Bar(f"{about}: numbers that are not finite", infinite, 0)
    for part in network.parts:
        pairs = zip(*map(jax.tree.leaves, (before.params[part], after.params[part])), strict=True)
        moved = sum(bool(jnp.any(a != b)) for a, b in pairs)
        yield Bar(f"{about}: arrays of {part} that moved", moved, 1, True)
    lost = abs(float(metrics["routing"]["load"].sum()) - 1)
    yield Bar(f"{about}: images that went nowhere, or twice", BATCH * lost, 1e-5)


def images_of(source: str, size: int) -> tuple[Images, Labels]:
    """A few images, float32 in [0, 1], and their classes."""
    split = _split(source)
    images = jnp.asarray(split.images, jnp.float32)
    if size:
        images = jnp.clip(jax.image.resize(images, (BATCH, size, size, 3), "linear"), 0, 255)
    return images / 255, jnp.asarray(split.labels)


@cache
def _split(source: str) -> Split:
    if source == "cifar10":
        test = load("image_folder", f"{DATA.value}/cifar10_jpeg.tar.gz").test
    else:
        archive = f"{DATA.value}/tiny-imagenet-21.tar.gz"
        test = load("image_folder", archive, train_split="val", test_split="val").test
    chosen = np.linspace(0, len(test.labels) - 1, BATCH).astype(int)
    return Split(test.images[chosen], test.labels[chosen])


if __name__ == "__main__":
    cli.run(main, needs=())
