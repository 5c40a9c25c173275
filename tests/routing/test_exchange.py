"""Experts on several devices against all of them on one, however uneven the load."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from advmoe_jax.models.transformer import mlp
from advmoe_jax.parallel import DATA_AXIS, EXPERT_AXIS, data_mesh, parallel
from advmoe_jax.routing import dispatch, exchange

EXPERTS, WIDTH, HIDDEN, SAMPLES = 8, 4, 6, 128


def draw(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


PARAMETERS = (
    draw(EXPERTS, WIDTH, HIDDEN),
    draw(EXPERTS, HIDDEN),
    draw(EXPERTS, HIDDEN, WIDTH),
    draw(EXPERTS, WIDTH),
)
LOADS = {
    "even": lambda key, shape: jax.random.randint(key, shape, 0, EXPERTS),
    "uneven": lambda key, shape: jnp.where(
        jax.random.uniform(key, shape) < 0.6, 2, jax.random.randint(key, shape, 0, EXPERTS)
    ),
    "one": lambda key, shape: jnp.full(shape, 5),
    # The samples of one device go to one expert, others' do not: rounds are common to all.
    "of one device": lambda key, shape: jnp.where(
        jnp.arange(SAMPLES)[:, None] < SAMPLES // 8, 0, jax.random.randint(key, shape, 0, EXPERTS)
    ),
}


def pulled(apply, parameters, samples, indices, weights):
    """The answers, and the gradients of a function of them."""

    def loss(parameters, samples, weights):
        answers = apply(parameters, samples, indices, weights)
        return jnp.sum(jnp.sin(answers)), answers

    gradients, answers = jax.grad(loss, (0, 1, 2), has_aux=True)(parameters, samples, weights)
    return answers, *gradients


@jax.jit
def whole(*arguments):
    def apply(parameters, samples, indices, weights):
        plan = dispatch.Every(indices)
        return dispatch.apply_experts(mlp, samples, plan, weights, parameters)

    return pulled(apply, *arguments)


def spread(shards, strategy):
    """``whole`` on eight devices, compiled once for all loads."""
    mesh = data_mesh(8, shards)
    plan = partial(dispatch.arrange, strategy=strategy, block_size=4)

    def apply(parameters, samples, indices, weights):
        sharded = exchange.Sharded(indices, EXPERTS // shards, plan)
        return exchange.apply_experts(mlp, samples, sharded, weights, parameters)

    def on_device(*arguments):
        answers, to_parameters, *gradients = pulled(apply, *arguments)
        return answers, jax.lax.psum(to_parameters, DATA_AXIS), *gradients

    rows, own = PartitionSpec(mesh.axis_names), PartitionSpec(EXPERT_AXIS)
    in_specs, out_specs = (own, rows, rows, rows), (rows, own, rows, rows)
    return parallel(on_device, mesh, in_specs=in_specs, out_specs=out_specs)


@pytest.mark.parametrize(
    ("top_k", "shards", "strategy"),
    [
        (1, 2, "blocks"),
        pytest.param(1, 4, "every", marks=pytest.mark.slow),
        pytest.param(2, 2, "every", marks=pytest.mark.slow),
        pytest.param(2, 8, "blocks", marks=pytest.mark.slow),
    ],
)
def test_answers_and_gradients_are_those_of_one_device(top_k, shards, strategy):
    run = spread(shards, strategy)
    for load in LOADS.values():
        indices = load(jax.random.key(top_k), (SAMPLES, top_k))
        weights = jax.random.uniform(jax.random.key(3), indices.shape)
        arguments = PARAMETERS, draw(SAMPLES, WIDTH), indices, weights
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5),
            run(*arguments),
            whole(*arguments),
        )


def test_seats_are_few_more_than_an_even_load_needs():
    assert exchange.seats(1024, 8) == 160
    assert exchange.seats(8, 8) == 8  # never more than there are choices


def test_an_empty_seat_costs_no_block(monkeypatch):
    """What is computed is the blocks of the choices that came, whatever the seats."""
    held, seats = 2, 32
    wanted = jnp.asarray([0, 1, 1] + [held] * (seats - 3))
    monkeypatch.setattr(dispatch, "apply_experts", lambda function, samples, plan, *_: plan)
    make = partial(dispatch.arrange, strategy="blocks", block_size=4)
    journey = exchange._Journey(mlp, make, held, 1, seats, 1)
    plan = jax.jit(lambda x: exchange._own_experts(journey, x, wanted, ()))(jnp.zeros((seats, 1)))
    assert plan.block_expert[plan.used].tolist() == [0, 1]
    assert plan.block_expert.max() < held
