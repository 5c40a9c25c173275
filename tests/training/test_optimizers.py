"""Schedules at their key points."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.training.optimizers import OptimizerSettings, create_optimizer, learning_rate

PEAK = 0.2


def rates(schedule, warmup_epochs=0.0, steps_per_epoch=10, num_epochs=10):
    settings = OptimizerSettings(schedule=schedule, learning_rate=PEAK, warmup_epochs=warmup_epochs)
    rate = learning_rate(settings, steps_per_epoch, num_epochs)
    return np.array([float(rate(step)) for step in range(steps_per_epoch * num_epochs + 1)])


def half_cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine(warmup):
    found = rates("cosine", warmup / 10)
    np.testing.assert_allclose(found[:warmup], PEAK * np.arange(warmup) / 20, rtol=1e-6)
    expected = [half_cosine(PEAK, 0, i / (100 - warmup)) for i in range(101 - warmup)]
    np.testing.assert_allclose(found[warmup:], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("warmup", [0, 20])
def test_linear(warmup):
    found = rates("linear", warmup / 10)
    np.testing.assert_allclose(found[:warmup], PEAK * np.arange(warmup) / 20, rtol=1e-6)
    np.testing.assert_allclose(found[warmup:], np.linspace(PEAK, 0, 101 - warmup), atol=1e-7)


@pytest.mark.parametrize("steps", [1000, 10])
def test_drops_that_fall_on_one_step_are_two(steps):
    settings = OptimizerSettings(schedule="drops", learning_rate=PEAK, drops=(0.7, 0.72))
    rate = learning_rate(settings, 1, steps)
    assert float(rate(0)) == pytest.approx(PEAK)
    assert float(rate(steps)) == pytest.approx(PEAK / 100)
    assert float(rate(6 * steps // 10)) == pytest.approx(PEAK)


def test_adamw_decays_kernels_alone_and_beside_the_gradient():
    settings = OptimizerSettings("adamw", 0.1, momentum=0.9, weight_decay=0.5, schedule="constant")
    optimizer = create_optimizer("experts", settings, 1, 1)
    params = {"layer": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}}
    gradients = jax.tree.map(lambda p: 3 * jnp.ones_like(p), params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Adam's first step is the sign, whatever the gradient's size.
    np.testing.assert_allclose(updates["layer"]["bias"], [-0.1], rtol=1e-5)
    np.testing.assert_allclose(updates["layer"]["kernel"], [[-0.1 - 0.1 * 0.5 * 2]], rtol=1e-5)


@pytest.mark.parametrize(("warmup_epochs", "rising"), [(0.0, 30), (1.3, 13), (1.7, 17)])
def test_one_cycle(warmup_epochs, rising):
    found = rates("one_cycle", warmup_epochs)
    up = [half_cosine(PEAK / 25, PEAK, i / rising) for i in range(rising)]
    falling = 100 - rising
    down = [half_cosine(PEAK, PEAK / 250_000, i / falling) for i in range(falling + 1)]
    np.testing.assert_allclose(found, up + down, rtol=1e-4, atol=1e-8)
    assert found.argmax() == rising and found[rising] == pytest.approx(PEAK)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 5.0])
def test_the_shortest_schedules_are_finite(schedule, warmup, epochs):
    found = rates(schedule, warmup, steps_per_epoch=1, num_epochs=epochs)
    assert np.isfinite(found).all() and found.max() <= PEAK * (1 + 1e-6)


def test_an_unknown_schedule_is_named():
    settings = OptimizerSettings(schedule="one_cycel")
    with pytest.raises(UserError, match=r"optimizer\.router\.schedule='one_cycel'.* one_cycle,"):
        create_optimizer("router", settings, 1, 1)
