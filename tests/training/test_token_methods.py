"""Training methods on a V-MoE, whose tokens are routed."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.errors import UserError
from advmoe_jax.models import ViT, functional
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.training import methods
from advmoe_jax.training.balance import Balance
from advmoe_jax.training.state import create_state

SIZE = {"patch": 4, "layers": 2, "width": 16, "hidden": 16, "heads": 2, "placement": "1"}
BATCH, TOKENS, EXPERTS = 24, 5, 3


@pytest.fixture(scope="module")
def setting():
    settings = ViT("vit_tiny_8", num_experts=EXPERTS, dispatch="every", **SIZE)
    built = functional(settings.create(in_channels=1, num_classes=3, rngs=nnx.Rngs(0)))
    labels = jnp.arange(BATCH) % 3
    # A class is where the image is bright.
    images = 0.5 * jax.random.uniform(jax.random.key(0), (BATCH, 8, 8, 1))
    rows = jnp.arange(8)[None, :, None, None] // 3 == labels[:, None, None, None]
    return *built, images + 0.5 * rows, labels


def step_of(network, method, **settings):
    loss = methods.METHODS[method].attack_loss
    attack = pgd(linf(0.05), num_steps=2, step_size=0.03, loss=loss)
    optimizers = dict.fromkeys(network.parts, optax.adam(5e-3))
    made = methods.Settings(router_objective="pathway", **settings)
    return methods.create_step(method, network, optimizers, attack, made), optimizers


@pytest.mark.parametrize(
    "method", ["standard", pytest.param("at", marks=pytest.mark.slow),
               pytest.param("trades", marks=pytest.mark.slow),
               pytest.param("joint", marks=pytest.mark.slow), "advmoe"],
)  # fmt: skip
def test_every_method_learns_and_moves_both_parts(setting, method):
    network, params, stats, images, labels = setting
    balance = Balance(importance=0.1, load=0.1, noise=1 / EXPERTS)
    step, optimizers = step_of(network, method, balance=balance)
    state, step = create_state(params, stats, optimizers), jax.jit(step)
    losses = []
    for i in range(60):
        keys = jax.random.split(jax.random.key(i), BATCH)
        state, metrics = step(state, images, labels, keys)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, params)
    for part in ("router", "experts"):
        assert max(jax.tree.leaves(moved[part])) > 1e-2
    assert metrics["routing"]["load"].shape == (EXPERTS,)
    assert "layers" not in metrics["routing"]  # of one layer, tokens count together


def test_advmoe_moves_one_half_at_a_time(setting):
    network, params, stats, images, labels = setting
    keys = jax.random.split(jax.random.key(0), BATCH)
    for frozen, other in (("router", "experts"), ("experts", "router")):
        step, optimizers = step_of(network, "advmoe", frozen=frozen)
        # A head of zeros has no gradient to give to what lies before it.
        head = {"kernel": jnp.ones((16, 3)) * jnp.arange(3), "bias": jnp.zeros(3)}
        start = params | {"experts": params["experts"] | {"head": head}}
        state = create_state(start, stats, optimizers)
        new = jax.jit(step)(state, images, labels, keys)[0].params
        jax.tree.map(np.testing.assert_array_equal, new[frozen], start[frozen])
        changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), new[other], start[other])
        assert any(jax.tree.leaves(changed))


def test_microbatches_drop_what_the_whole_batch_drops():
    settings = ViT("vit_tiny_8", num_experts=EXPERTS, dispatch="every", dropout=0.2, **SIZE)
    model = settings.create(in_channels=1, num_classes=3, rngs=nnx.Rngs(0))
    network, params, stats = functional(model)
    params["experts"]["head"]["kernel"] = jax.random.normal(jax.random.key(2), (16, 3))
    images = jax.random.uniform(jax.random.key(0), (BATCH, 8, 8, 1))
    labels, keys = jnp.arange(BATCH) % 3, jax.random.split(jax.random.key(1), BATCH)
    attack = pgd(linf(0.05), num_steps=1, step_size=0.05)
    optimizers = dict.fromkeys(network.parts, optax.sgd(0.1))
    create = partial(methods.create_step, "standard", network, optimizers, attack)
    found = [
        jax.jit(create(methods.Settings(), None, parts))(
            create_state(params, stats, optimizers), images, labels, keys
        )[0].params
        for parts in (1, 3)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), *found)


def test_places_that_advmoe_would_not_count_are_refused():
    capacity = Capacity(training=1.5)
    model = ViT("vit_tiny_8", num_experts=EXPERTS, dispatch="every", capacity=capacity, **SIZE)
    network = functional(model.create(in_channels=1, num_classes=3, rngs=nnx.Rngs(0)))[0]
    step_of(network, "joint")
    with pytest.raises(UserError, match=r"model.capacity.training=1.5 drops .* set it to 0, or"):
        step_of(network, "advmoe")


def test_hydra_and_random_routes_are_refused(setting):
    network = setting[0]
    with pytest.raises(UserError, match="hydra"):
        step_of(network, "hydra")
    with pytest.raises(UserError, match=r"balance\.warmup_epochs"):
        step_of(network, "at", balance=Balance(warmup_steps=3))


def test_the_attack_on_routers_of_layers_compares_with_scores_that_the_experts_have_moved(setting):
    network, params, stats, images, labels = setting
    head = {"kernel": jnp.ones((16, 3)) * jnp.arange(3), "bias": jnp.zeros(3)}
    params = params | {"experts": params["experts"] | {"head": head}}
    seen = []

    def attack(function, images, labels, keys, clean):
        seen.append((function(images), clean))
        return images

    optimizers = dict.fromkeys(network.parts, optax.sgd(20.0))
    made = methods.Settings(router_objective="pathway")
    step = methods.create_step("advmoe", network, optimizers, attack, made)
    keys = jax.random.split(jax.random.key(0), BATCH)
    step(create_state(params, stats, optimizers), images, labels, keys)
    assert len(seen) == 2
    for now, clean in seen:
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), now, clean)
    first, second = (jax.tree.leaves(clean)[-1] for _, clean in seen)
    assert float(jnp.abs(first - second).max()) > 1e-3  # the router's scores
