"""A V-MoE, and one block of it, against google-research/vmoe: outputs, routes, losses, gradients.

``data/vmoe.npz`` was recorded by running the published modules (commit 942a78b, jax 0.10.2,
float32, products at the highest precision) on made-up values: 6 images of 8x8, patch 4, 3 blocks of
width 8, of which 1 and 2 are mixtures of 3 experts, 2 per token, ``pre_logits`` of 6 units. The
objective is the sum of logits times a fixed array, plus 0.7 of the importance loss and 0.3 of the
load loss. The noise that the published router draws was replaced by a recorded array. Four passes:
in inference with places for all choices; in training likewise; in inference with 12 places per
expert; in training with 12 places and Batch Prioritized Routing.

``data/vmoe_block.npz`` was recorded alike of the block numbered 1 alone, on made-up tokens
[6, 5, 8], without noise: with places for all choices, and with 12 and Batch Prioritized Routing.
The objective is the sum of its output times a fixed array, plus 0.7 of the importance loss.
"""

from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models import ViT, functional
from advmoe_jax.models.model import Model
from advmoe_jax.published.vmoe_names import params_of
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.training.balance import Balance, Noise, balancing_loss

FILE = Path(__file__).parent / "data" / "vmoe.npz"
EXPERTS, TOP_K, LAYERS = 3, 2, 2
NETWORK = ViT(
    "vit_tiny_8",
    num_experts=EXPERTS,
    top_k=TOP_K,
    placement="1,2",
    patch=4,
    layers=3,
    width=8,
    hidden=12,
    heads=2,
    representation=6,
)
RATIO = 0.5  # half of the 20 places that an even load needs, rounded up to 12
KEPT = {"dropless": 120, "noisy": 120, "dropping": 69, "priority": 69}  # choices of 120
PASSES = {
    "dropless": (False, Capacity()),
    "noisy": (True, Capacity()),
    "dropping": (False, Capacity(evaluation=RATIO, images=6)),
    "priority": (True, Capacity(training=RATIO, images=6, batch_priority=True)),
}


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as file:
        return {name: file[name] for name in file.files}


def under(recorded, prefix):
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    ("name", "strategy"), [*((name, "blocks") for name in PASSES), ("dropless", "every")]
)
def test_one_network_equals_the_published_one(recorded, name, strategy):
    training, capacity = PASSES[name]
    settings = NETWORK._replace(capacity=capacity, dispatch=strategy)
    model = settings.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))
    network, params, stats = functional(model)
    params = params_of(under(recorded, "params/"), params)
    images, sigma = recorded["images"], 1 / EXPERTS
    # [layers, B, T, N] -> [B, layers T, N]
    normal = recorded["noise"].swapaxes(0, 1).reshape(len(images), -1, EXPERTS)
    noise = Noise(sigma * jnp.asarray(normal), jnp.asarray(normal)) if training else None
    # The published losses are added up over the layers; in inference there is no load loss.
    weights = {"importance": 0.7 * LAYERS, "load": 0.3 * LAYERS * training, "noise": sigma}

    def objective(params, images):
        added = None if noise is None else noise.added
        output = network.apply(params, stats, images, train=training, noise=added)[0]
        loss = balancing_loss(
            Balance(**weights), output.routing, noise, routers=network.num_routers
        )
        return jnp.sum(output.logits * recorded["cotangent"]) + loss, (output, loss)

    with jax.default_matmul_precision("highest"):
        gradients, (output, loss) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
            params, images
        )

    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(output.logits, recorded[f"{name}/logits"], **close)
    np.testing.assert_allclose(loss, recorded[f"{name}/aux"], rtol=1e-4)
    chosen = jax.nn.one_hot(output.routing.indices, EXPERTS) * output.routing.weights[..., None]
    combined = np.sum(chosen, axis=-2).reshape(len(images), LAYERS, -1, EXPERTS).swapaxes(0, 1)
    theirs = recorded[f"{name}/combine"]
    np.testing.assert_array_equal(combined > 0, theirs > 0)  # route for route, drop for drop
    np.testing.assert_allclose(combined, theirs, rtol=1e-4, atol=1e-6)
    assert np.sum(theirs > 0) == KEPT[name]  # the fixture is what its name says
    expected = params_of(under(recorded, f"{name}/grad/"), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), gradients[0], expected)
    np.testing.assert_allclose(gradients[1], recorded[f"{name}/grad_images"], **close)


class Alone(nnx.Module):
    """A block for a backbone: tokens go in, tokens come out."""

    def __init__(self, block):
        self.block1, self.num_tokens = block, 5

    def __call__(self, x, context):
        return self.block1(x, context)


@pytest.fixture(scope="module")
def recorded_block(recorded):
    with np.load(FILE.with_name("vmoe_block.npz")) as file:
        found = {name: file[name] for name in file.files}
    of_block = under(recorded, "params/Encoder/encoderblock_1/")
    params = {f"Encoder/encoderblock_1/{name}": value for name, value in of_block.items()}
    return found | {"params": params}


@pytest.mark.parametrize("strategy", ["blocks", "every"])
@pytest.mark.parametrize("name", ["dropless", "priority"])
def test_one_block_equals_the_published_one(recorded_block, name, strategy):
    capacity = Capacity(evaluation=RATIO, images=6, batch_priority=True)
    capacity = capacity if name == "priority" else Capacity()
    settings = NETWORK._replace(placement="1", dispatch=strategy, capacity=capacity)
    whole = settings.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))
    model = Model(
        lambda tokens: tokens,
        Alone(whole.backbone.block1),
        whole.router,
        **{"num_experts": EXPERTS, "top_k": TOP_K, "gate": settings.gate},
        **{"strategy": strategy, "capacity": capacity},
    )
    network, params, stats = functional(model)
    params = params_of(recorded_block["params"], params)

    def objective(params, tokens):
        output = network.apply(params, stats, tokens)[0]
        loss = balancing_loss(Balance(importance=0.7), output.routing, None, routers=1)
        return jnp.sum(output.logits * recorded_block["cotangent"]) + loss, (output.logits, loss)

    with jax.default_matmul_precision("highest"):
        gradients, (tokens, loss) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(
            params, recorded_block["tokens"]
        )

    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tokens, recorded_block[f"{name}/tokens"], **close)
    np.testing.assert_allclose(loss, 0.7 * recorded_block[f"{name}/aux"], rtol=1e-4)
    expected = params_of(under(recorded_block, f"{name}/grad/"), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), gradients[0], expected)
    np.testing.assert_allclose(gradients[1], recorded_block[f"{name}/grad_tokens"], **close)


def test_dropping_is_seen_in_the_recorded_block(recorded_block):
    dropless, priority = (recorded_block[f"{name}/tokens"] for name in ("dropless", "priority"))
    assert np.mean(np.abs(dropless - priority).max(axis=-1) > 1e-3) > 0.2
