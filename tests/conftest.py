"""Eight virtual CPU devices for every test, set before JAX starts; a tiny network."""

import os

# What one test compiles, the others find, in this process, in those it starts and in the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    os.path.join(os.path.dirname(os.path.dirname(__file__)), ".pytest_cache", "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # Nearly all of a test's time is compilation.
        + " --xla_backend_optimization_level=0"
    )

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation.explanation import Seen
from advmoe_jax.models.layers import BatchNorm, Conv, Linear
from advmoe_jax.models.moe import conv_factory, number_layers
from advmoe_jax.models.network import Model, Normalize, functional
from advmoe_jax.models.router import LayerRouters


class TinyBackbone(nnx.Module):
    """Stem, one convolution that may be an MoE, head: compiles in a second."""

    def __init__(self, num_experts, classes, rngs):
        self.stem, self.bn1 = Conv(1, 6, 3, 1, 1, rngs=rngs), BatchNorm(6)
        self.conv = conv_factory(num_experts)(6, 8, 3, 2, 1, rngs=rngs)
        self.bn2, self.head = BatchNorm(8), Linear(8, classes, rngs=rngs)
        self.more = ()

    def __call__(self, x, context):
        x = jax.nn.relu(self.bn1(self.stem(x, context), context))
        x = jax.nn.relu(self.bn2(self.conv(x, context), context))
        for name in self.more:
            x = jax.nn.relu(getattr(self, name)(x, context))
        return self.head(jnp.mean(x, axis=(1, 2)))


class TinyRouter(nnx.Module):
    """One convolution and a head."""

    def __init__(self, num_experts, rngs):
        self.stem, self.bn = Conv(1, 4, 3, 2, 1, rngs=rngs), BatchNorm(4)
        self.head = Linear(4, num_experts, rngs=rngs)
        # Spread-out scores: an untrained head would send every image to one expert.
        self.head.kernel[...] = jax.random.normal(jax.random.key(5), (4, num_experts))

    def __call__(self, images, context):
        x = jax.nn.relu(self.bn(self.stem(images, context), context))
        return self.head(jnp.mean(x, axis=(1, 2)))


def layer_routers(backbone, num_experts, rngs):
    """Routers whose scores are spread out, for the same reason."""
    channels = {name: layer.in_features for name, layer in number_layers(backbone).items()}
    routers = LayerRouters(channels, num_experts, width=5, rngs=rngs)
    for i, name in enumerate(channels):
        router = getattr(routers, name)
        for j, layer in enumerate((router.hidden, router.head)):
            layer.kernel[...] = jax.random.normal(jax.random.key(7 * i + j), layer.kernel.shape)
    return routers


@pytest.fixture(scope="session")
def tiny_model():
    """(num_experts, ...) -> Model for 1-channel images, of 4 classes by default."""

    def build(num_experts=2, classes=4, seed=0, scope="global", **settings):
        rngs = nnx.Rngs(seed)
        router = TinyRouter(num_experts, rngs) if num_experts > 1 else None
        backbone = TinyBackbone(num_experts, classes, rngs)
        if scope == "per_layer":  # with a second MoE layer
            backbone.more = ("more0",)
            backbone.more0 = conv_factory(num_experts)(8, 8, 3, 1, 1, rngs=rngs)
            router = layer_routers(backbone, num_experts, rngs)
        settings = {"block_size": 4} | settings
        normalize = Normalize((0.5,), (0.25,))
        return Model(normalize, backbone, router, num_experts=num_experts, **settings)

    return build


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """(num_experts, ...) -> (network, params, stats) for 1-channel images and 4 classes."""
    return lambda *arguments, **settings: functional(tiny_model(*arguments, **settings))


@pytest.fixture
def made_up():
    """What was seen of four images, by two layers of two experts."""
    routes = np.array([[[0], [0]], [[0], [1]], [[1], [1]], [[1], [0]]])
    attacked = np.array([[[0], [1]], [[0], [1]], [[0], [1]], [[1], [0]]])
    return Seen(
        labels=np.array([0, 0, 2, 2]),
        adversarial=np.full((4, 2, 2, 3), 0.5, np.float32),
        clean=np.array([0, 0, 2, 1]),
        attacked=np.array([1, 0, 2, 1]),
        routes=routes,
        attacked_routes=attacked,
        clean_rerouted=np.array([0, 0, 1, 1]),
        attacked_on_route=np.array([0, 0, 2, 1]),
        forced=np.array([[0, 0, 0, 0], [2, 2, 2, 2]]),
        forced_attacked=np.array([[0, 1, 1, 1], [2, 2, 2, 1]]),
    )
