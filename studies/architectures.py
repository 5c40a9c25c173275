"""Every architecture takes a real step of AdvMoE on real images."""

import os

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.data.sources import load
from advmoe_jax.models.network import functional
from advmoe_jax.models.registry import create_model, model_config
from advmoe_jax.training.methods import Settings, create_step
from advmoe_jax.training.state import Optimizers, create_state

ARCHIVE_FOLDER = os.environ.get("ADVMOE_DATA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ARCHIVE_FOLDER, reason="ADVMOE_DATA does not name the folder with the real archives"
    ),
]
BATCH = 4
CIFAR_FORMS = ["resnet18_cifar", "wrn_28_10_cifar", "vgg16_bn", "densenet_cifar"]
NARROW = {"resnet18": 8, "wrn_28_10": 2, "vgg16": 8, "densenet": 8}


@pytest.fixture(scope="module")
def cifar10():
    images, labels = load("image_folder", f"{ARCHIVE_FOLDER}/cifar10_jpeg.tar.gz").test
    return images[::2500], labels[::2500]


@pytest.fixture(scope="module")
def tiny_imagenet():
    archive = f"{ARCHIVE_FOLDER}/tiny-imagenet-21.tar.gz"
    images, labels = load("image_folder", archive, train_split="val", test_split="val").test
    return images[::263], labels[::263]


def one_step(name, images, labels, resolution=0):
    """The state before and after a step, and its metrics."""
    width = next(width for family, width in NARROW.items() if name.startswith(family))
    router = {"width": 4, "blocks": 1, "resolution": resolution}
    config = model_config(name, num_experts=2, ratio=0.5, width=width, block_size=2, router=router)
    model = create_model(config, in_channels=3, num_classes=21, rngs=nnx.Rngs(0))
    network, params, stats = functional(model)
    optimizers = Optimizers(router=optax.sgd(0.1), experts=optax.sgd(0.1))
    attack = pgd(linf(8 / 255), num_steps=1, step_size=5 / 255, loss="kl", start="gaussian")
    step = create_step("advmoe", network, optimizers, attack, Settings())
    state = create_state(params, stats, optimizers)
    keys = jax.random.split(jax.random.key(0), len(labels))
    images = jnp.asarray(images, jnp.float32) / 255
    return state, *jax.jit(step)(state, images, jnp.asarray(labels), keys)


def check(before, after, metrics):
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((after, metrics)))
    for branch in ("router", "experts"):
        moved = jax.tree.map(
            lambda a, b: bool(jnp.any(a != b)), after.params[branch], before.params[branch]
        )
        assert any(jax.tree.leaves(moved))
    # Every image went somewhere.
    assert float(metrics["routing"]["load"].sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "name", ["resnet18_cifar", "wrn_28_10_cifar", "vgg16_bn", "densenet_cifar"]
)
def test_on_cifar10(name, cifar10):
    check(*one_step(name, *cifar10))


@pytest.mark.parametrize(
    "name", ["resnet18_cifar", "wrn_28_10_cifar", "vgg16_bn", "densenet_cifar"]
)
def test_on_tiny_imagenet(name, tiny_imagenet):
    check(*one_step(name, *tiny_imagenet, resolution=32))


@pytest.mark.parametrize("name", ["resnet18_imagenet", "wrn_28_10_imagenet", "densenet_imagenet"])
def test_the_imagenet_forms_at_224_pixels(name, tiny_imagenet):
    images, labels = tiny_imagenet
    large = jax.image.resize(jnp.asarray(images, jnp.float32), (BATCH, 224, 224, 3), "linear")
    check(*one_step(name, np.clip(large, 0, 255), labels, resolution=32))
