"""The networks that are measured, and the passes that are made through them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import optax

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.evaluation import default_router, network_cost
from advmoe_jax.models import CNN, PRESETS, Network, Output, RouterSettings, functional
from advmoe_jax.training import Optimizers, Settings, Step, create_step
from advmoe_jax.types import Array, Images, Labels, Logits, Tree

SIZE, CLASSES = 32, 10
EPSILON, STEP_SIZE, ATTACK_STEPS, BETA = 8 / 255, 5 / 255, 2, 6.0


class Bound(NamedTuple):
    """A network with its arrays, and the MACs of one image."""

    network: Network
    params: Tree
    stats: Tree
    macs: int


def dense(name: str, ratio: float = 1.0, dtype: str = "float32") -> Bound:
    """The network with one expert; at the experts' ratio it is one pathway without dispatch."""
    return _bound(CNN(name, ratio=ratio, dtype=dtype))


def moe(
    name: str,
    images: Images,
    num_experts: int = 2,
    *,
    dispatch: str = "auto",
    block_size: int = 0,
    dtype: str = "float32",
) -> Bound:
    """Experts of half width, with the architecture's default router.

    A router that was not trained sends all images to one expert; this one's head is scaled so that
    ``images`` spread over all of them.
    """
    settings = {"dispatch": dispatch, "block_size": block_size, "dtype": dtype}
    return _spread_routes(untrained(name, num_experts=num_experts, ratio=0.5, **settings), images)


def untrained(
    name: str, *, router: str = "", size: int = SIZE, classes: int = CLASSES, **settings: Any
) -> Bound:
    """A network by ``CNN``'s settings; a mixture has its default router, or one of ``PRESETS``.

    Routes are not spread.
    """
    cnn = CNN(name, **settings)
    if cnn.num_experts > 1:
        preset = PRESETS[router or default_router(cnn, (size, size, 3), classes)]
        cnn = cnn._replace(router=RouterSettings.of(preset))
    return _bound(cnn, size, classes)


def random_batch(batch: int) -> tuple[Images, Labels]:
    """Images float32 [B, 32, 32, 3] in [0, 1], and labels."""
    images = jax.random.uniform(jax.random.key(0), (batch, SIZE, SIZE, 3))
    return images, jnp.arange(batch) % CLASSES


def infer(bound: Bound, params: Tree, images: Images) -> Output:
    """One pass in inference mode, router included."""
    return bound.network.apply(params, bound.stats, images)[0]


def train(bound: Bound, params: Tree, images: Images) -> Logits:
    """Logits of one pass in training mode."""
    return bound.network.apply(params, bound.stats, images, train=True)[0].logits


def gradients(function: Callable[[Any], Array]) -> Callable[[Any], Any]:
    """The gradients of the sum of squares of an array-valued function of one tree."""
    return jax.grad(lambda x: jnp.sum(jnp.square(function(x))))


def advmoe_step(network: Network, axis_name: str | None = None) -> tuple[Step, Optimizers]:
    """AdvMoE's step with the published attack, or TRADES' of a dense network; its optimizers."""
    optimizers = {part: optax.sgd(0.01, 0.9) for part in network.parts}
    attack = pgd(
        linf(EPSILON), num_steps=ATTACK_STEPS, step_size=STEP_SIZE, loss="kl", start="gaussian"
    )
    settings = Settings(beta=BETA, alpha=BETA, router_objective="assignment")
    method = "advmoe" if "router" in network.parts else "trades"
    return create_step(method, network, optimizers, attack, settings, axis_name), optimizers


def _bound(cnn: CNN, size: int = SIZE, classes: int = CLASSES) -> Bound:
    model = cnn.create(in_channels=3, num_classes=classes, rngs=nnx.Rngs(0))
    macs = network_cost(cnn, (size, size, 3), classes)["macs"]["total"]
    return Bound(*functional(model), macs)


def _spread_routes(bound: Bound, images: Images) -> Bound:
    route = jax.jit(lambda params: bound.network.route(params, bound.stats, images)[0])
    scores = route(bound.params).scores[:, 0]
    scale = 1 / jnp.std(scores, axis=0)
    router = dict(bound.params["router"])
    head = router["head"]
    bias = (head["bias"] - jnp.mean(scores, axis=0)) * scale
    router["head"] = {"kernel": head["kernel"] * scale, "bias": bias}
    return bound._replace(params=bound.params | {"router": router})
