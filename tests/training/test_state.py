"""The average of the weights, against the recursion written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.training.checkpoint import tree_sha256
from advmoe_jax.training.state import create_state, evaluated, update_average

OPTIMIZERS = dict.fromkeys(("router", "experts"), optax.sgd(0.1))


def state_of(value, averaged=True, dtype=jnp.float32):
    params = {"router": {}, "experts": {"w": jnp.full(3, value, dtype)}}
    stats = {"router": {}, "experts": {"mean": jnp.full(2, 10 * value)}}
    return create_state(params, stats, OPTIMIZERS, averaged)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_average_is_the_recursion(decay, start):
    weights = np.random.default_rng(0).normal(size=12)
    state, expected = state_of(5.0), 5.0
    step = jax.jit(update_average, static_argnums=(1, 2))
    for i, weight in enumerate(weights):
        new = state_of(weight)
        state = state._replace(step=jnp.int32(i + 1), params=new.params, stats=new.stats)
        state = step(state, decay, start)
        done = max(i - start, 0)
        d = min(decay, done / (done + 9))
        expected = d * expected + (1 - d) * weight
        np.testing.assert_allclose(state.average["params"]["experts"]["w"], expected, rtol=1e-5)
        mean = state.average["stats"]["experts"]["mean"]
        np.testing.assert_allclose(mean, 10 * expected, rtol=1e-5)
        if i <= start:  # no trace of what was there before
            assert expected == weight
    np.testing.assert_array_equal(state.params["experts"]["w"], np.float32(weights[-1]))


def test_the_average_is_what_is_evaluated_if_there_is_one():
    state = state_of(1.0, averaged=False)
    assert evaluated(state) == (state.params, state.stats)
    state = state_of(1.0, dtype=jnp.bfloat16)
    assert state.average["params"]["experts"]["w"].dtype == jnp.float32
    average = jax.tree.map(lambda x: x + 1, state.average)
    params, stats = evaluated(state._replace(average=average))
    assert params["experts"]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["experts"]["w"], 2 * np.ones(3))
    np.testing.assert_array_equal(stats["experts"]["mean"], [11, 11])


def test_without_an_average_the_state_has_the_leaves_of_before():
    state = state_of(1.0, averaged=False)
    before = {name: getattr(state, name) for name in ("step", "params", "stats", "opt_state")}
    assert tree_sha256(state) == tree_sha256(before)
    assert tree_sha256(state_of(1.0)) != tree_sha256(before)
