"""A badly started router collapses alone, recovers with help: ``python -m studies.collapse``.

A router whose head has a bias of 4 towards the first expert sends every image there. Trained on,
it may stay so: an expert that gets no images gives its router nothing to prefer it by. With
balancing losses, noise in the scores and, for one router per layer, a warm-up of random routes,
every expert of every layer gets its share again. Shown of the joint method with one router for the
network and of AdvMoE with one per layer, with a network of two MoE layers on 32 images.

That is one example, that of seed 0, and no law: from other initial values some routers recover
alone, and not every layer recovers with this help in 120 steps. A ResNet-10 with eight routers had
layers that did not in 240.

Takes about two minutes on two CPU cores, nearly all of it compilation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jaxtyping import Float

from advmoe_jax import cli
from advmoe_jax.attacks import linf, pgd
from advmoe_jax.models import LayerRouters, Model, Normalize, functional
from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear
from advmoe_jax.models.moe import conv_factory, number_layers
from advmoe_jax.training import Balance, Settings, create_state, create_step
from advmoe_jax.types import Array, Images, Labels
from studies.bars import Bar, conclude

STEPS = flags.DEFINE_integer("steps", 120, "of training, each on the same 32 images")
SEED = flags.DEFINE_integer("seed", 0, "of images, parameters and attacks", allow_override=True)
BATCH, CLASSES, BIAS = 32, 4, 4.0


class Case(NamedTuple):
    """A network that collapses, and the remedy.

    Attributes:
        method: one of ``METHODS``.
        scope: of the routers, one of ``SCOPES``.
        remedy: what is done against collapse.
    """

    method: str
    scope: str
    remedy: Balance


CASES = (
    Case(
        "joint",
        "global",
        Balance(importance=3.0, load=3.0, noise=0.5),
    ),
    Case(
        "advmoe",
        "per_layer",
        Balance(switch=3.0, entropy=3.0, noise=0.5, warmup_steps=30),
    ),
)


def main() -> None:
    """Trains every case without its remedy and with it."""
    conclude("load of the second expert", [bar for case in CASES for bar in bars_of(case)])


def bars_of(case: Case) -> Iterator[Bar]:
    """What must happen with and without the remedy."""
    about = f"{case.method}, router {case.scope}"
    alone = loads_after_training(case, Balance())
    yield Bar(f"{about}: alone, the most in any layer", alone[:, 1].max(), 0.0)
    helped = loads_after_training(case, case.remedy)
    yield Bar(f"{about}: helped, the least of any expert and layer", helped.min(), 0.1, True)


class Backbone(nnx.Module):
    """Stem, one or two MoE layers of two experts, head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.bn1 = Conv(1, 6, 3, 1, 1, rngs=rngs), BatchNorm(6)
        self.conv = conv_factory(2)(6, 8, 3, 2, 1, rngs=rngs)
        self.bn2, self.head = BatchNorm(8), Linear(8, CLASSES, rngs=rngs)
        self.has_more = False

    def add_layer(self, rngs: nnx.Rngs) -> None:
        """Puts a second MoE layer behind the first."""
        self.has_more, self.more = True, conv_factory(2)(8, 8, 3, 1, 1, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        """Normalised images [B, H, W, 1] -> logits [B, 4]."""
        x = jax.nn.relu(self.bn1(self.stem(x, context), context))
        x = jax.nn.relu(self.bn2(self.conv(x, context), context))
        if self.has_more:
            x = jax.nn.relu(self.more(x, context))
        return self.head(jnp.mean(x, axis=(1, 2)))


class GlobalRouter(nnx.Module):
    """One convolution and a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.bn = Conv(1, 4, 3, 2, 1, rngs=rngs), BatchNorm(4)
        self.head = Linear(4, 2, rngs=rngs)

    def __call__(self, images: Array, context: Context) -> Array:
        """Normalised images [B, H, W, 1] -> scores [B, 2]."""
        x = jax.nn.relu(self.bn(self.stem(images, context), context))
        return self.head(jnp.mean(x, axis=(1, 2)))


def collapsed(scope: str) -> Model:
    """A mixture whose routers prefer the first expert, by their heads' bias alone."""
    rngs = nnx.Rngs(SEED.value)
    router = GlobalRouter(rngs)
    backbone = Backbone(rngs)
    routers, first_key = [(router.head,)], 5
    if scope == "per_layer":
        backbone.add_layer(rngs)
        features = {name: layer.in_features for name, layer in number_layers(backbone).items()}
        router = LayerRouters(features, 2, width=5, rngs=rngs)
        each = [getattr(router, name) for name in router.names]
        routers, first_key = [(one.hidden, one.head) for one in each], 0
    for i, layers in enumerate(routers):
        for j, layer in enumerate(layers):  # scores that differ between images
            key = jax.random.key(SEED.value + first_key + 7 * i + j)
            layer.kernel[...] = jax.random.normal(key, layer.kernel.shape)
        layers[-1].bias[...] = jnp.asarray([BIAS, 0.0])
    normalize = Normalize((0.5,), (0.25,))
    return Model(normalize, backbone, router, num_experts=2, block_size=4)


def loads_after_training(case: Case, settings: Balance) -> Float[np.ndarray, "decisions experts"]:
    """Every decision's load per expert, by the router's own choice without noise."""
    network, params, stats = functional(collapsed(case.scope))
    rate = optax.cosine_decay_schedule(0.05, STEPS.value)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate, momentum=0.9))
    optimizers = {part: rule for part in network.parts}
    attack = pgd(linf(0.05), num_steps=1, step_size=0.05, loss="kl", start="gaussian")
    method = create_step(case.method, network, optimizers, attack, Settings(balance=settings))
    step = jax.jit(method)
    state = create_state(params, stats, optimizers)
    images, labels = made_up()
    for i in range(STEPS.value):
        key = jax.random.fold_in(jax.random.key(SEED.value), i)
        state, _ = step(state, images, labels, jax.random.split(key, BATCH))
    routing = jax.jit(network.route)(state.params, state.stats, images)[0]
    chosen = np.asarray(routing.indices[:, :, 0])
    return np.stack([np.bincount(column, minlength=2) / BATCH for column in chosen.T])


def made_up() -> tuple[Images, Labels]:
    """Noise of 8x8 pixels with a bright row, whose place is the class."""
    rng = np.random.default_rng(SEED.value)
    labels = rng.integers(CLASSES, size=BATCH)
    images = rng.uniform(size=(BATCH, 8, 8, 1)).astype(np.float32) / 2
    images[np.arange(BATCH), 2 * labels] += 0.5
    return jnp.asarray(images), jnp.asarray(labels)


if __name__ == "__main__":
    cli.run(main, needs=())
