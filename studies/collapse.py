"""A badly started router collapses alone, recovers with help: ``python -m studies.collapse``.

A router whose head has a bias of 4 towards the first expert sends every image there. Trained on,
it stays so: an expert that gets no images gives its router nothing to prefer it by. With balancing
losses, noise in the scores and, for one router per layer, a warm-up of random routes, every expert
of every layer gets its share again. Shown of the joint method with one router for the network and
of AdvMoE with one per layer, with a ResNet-10 of width 8 on images that are made up.

Takes about two minutes on two CPU cores.
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
from advmoe_jax.models import CNN, RouterSettings, functional
from advmoe_jax.training import Balance, Settings, create_state, create_step
from advmoe_jax.types import Images, Labels
from studies.bars import Bar, conclude

STEPS = flags.DEFINE_integer("steps", 120, "of training, each on the same 32 images")
SEED = flags.DEFINE_integer("seed", 0, "of images, parameters and attacks", allow_override=True)
BATCH, CLASSES, BIAS = 32, 4, 4.0


class Case(NamedTuple):
    """A network that collapses, and the remedy.

    Attributes:
        method: one of ``METHODS``.
        router: of a mixture of two experts.
        remedy: what is done against collapse.
    """

    method: str
    router: RouterSettings
    remedy: Balance


CASES = (
    Case(
        "joint",
        RouterSettings(width=4, blocks=1),
        Balance(importance=3.0, load=3.0, noise=0.5),
    ),
    Case(
        "advmoe",
        RouterSettings("per_layer", width=5),
        Balance(switch=3.0, entropy=3.0, noise=0.5, warmup_steps=30),
    ),
)


def main() -> None:
    """Trains every case without its remedy and with it."""
    conclude("load of the second expert", [bar for case in CASES for bar in bars_of(case)])


def bars_of(case: Case) -> Iterator[Bar]:
    """What must happen with and without the remedy."""
    about = f"{case.method}, router {case.router.scope}"
    alone = loads_after_training(case, Balance())
    print(f"{about}, alone: {alone[:, 1]}", flush=True)
    yield Bar(f"{about}: alone, the most in any layer", alone[:, 1].max(), 0.0)
    helped = loads_after_training(case, case.remedy)
    print(f"{about}, helped: {helped[:, 1]}", flush=True)
    yield Bar(f"{about}: helped, the least of any expert and layer", helped.min(), 0.1, True)


def loads_after_training(case: Case, settings: Balance) -> Float[np.ndarray, "decisions experts"]:
    """Every decision's load per expert, by the router's own choice without noise."""
    # So small a network is no slower with all experts computed, and compiles in half the time.
    mixture = {"num_experts": 2, "ratio": 0.5, "dispatch": "every", "router": case.router}
    cnn = CNN("resnet10_cifar", width=8, **mixture)
    model = cnn.create(in_channels=1, num_classes=CLASSES, rngs=nnx.Rngs(SEED.value))
    network, params, stats = functional(model)
    per_layer = case.router.scope == "per_layer"
    for router in params["router"].values() if per_layer else [params["router"]]:
        router["head"]["bias"] = jnp.asarray([BIAS, 0.0])
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
