"""What is chosen from scores, and how it is weighed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.routing.choice import choose

SCORES = jnp.array([[0.3, -1.0, 2.5], [1e4, 3.0, -7.0], [-0.1, 0.0, -0.2]])


def test_straight_through_weight_is_one_and_its_gradient_is_the_chosen_scores():
    routing = choose(SCORES)
    assert routing.indices.tolist() == [[2], [0], [1]]
    assert routing.indices.dtype == jnp.int32
    np.testing.assert_array_equal(routing.weights, np.ones((3, 1), np.float32))
    gradient = jax.grad(lambda s: jnp.sum(choose(s).weights * jnp.array([[2.0], [3.0], [5.0]])))(
        SCORES
    )
    np.testing.assert_array_equal(gradient, [[0, 0, 2], [3, 0, 0], [0, 5, 0]])


def test_straight_through_of_several_experts():
    gradient = jax.grad(lambda s: jnp.sum(choose(s, top_k=2).weights))(SCORES)
    np.testing.assert_array_equal(gradient, [[1, 0, 1], [1, 1, 0], [1, 1, 0]])


def test_softmax_gate_gives_probabilities():
    routing = choose(SCORES, top_k=2, gate="softmax")
    scores = np.asarray(SCORES, np.float64)
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    expected = np.take_along_axis(probabilities, np.asarray(routing.indices), 1)
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(choose(s, gate="softmax").weights))(SCORES[:1])
    p = probabilities[0]
    np.testing.assert_allclose(gradient[0], p[2] * (np.eye(3)[2] - p), rtol=1e-5)


@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_best_first(top_k, gate):
    routing = choose(SCORES, top_k, gate)
    np.testing.assert_array_equal(routing.indices, np.argsort(-SCORES, axis=1)[:, :top_k])
    assert routing.weights.shape == (3, top_k)
    np.testing.assert_array_equal(routing.scores, SCORES)


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_outside_the_experts(top_k):
    with pytest.raises(UserError, match=rf"top_k={top_k} .*num_experts=3"):
        choose(SCORES, top_k)


def test_unknown_gate():
    with pytest.raises(UserError, match=r"'hard'.*straight_through, softmax"):
        choose(SCORES, gate="hard")


def test_scores_are_float32():
    routing = choose(SCORES.astype(jnp.bfloat16), 2, "softmax")
    assert routing.scores.dtype == routing.weights.dtype == jnp.float32


def test_without_the_surrogate_the_gate_has_its_true_derivative():
    np.testing.assert_array_equal(choose(SCORES, surrogate=False).weights, np.ones((3, 1)))
    gradient = jax.grad(lambda s: jnp.sum(choose(s, surrogate=False).weights))(SCORES)
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))
    soft = choose(SCORES, gate="softmax", surrogate=False)
    np.testing.assert_array_equal(soft.weights, choose(SCORES, gate="softmax").weights)


def test_following_weighs_as_the_gate_would():
    chosen = choose(SCORES[:, None], 2, "softmax")
    for gate in ("softmax", "noisy_softmax"):
        again = choose(chosen.scores, 1, gate, indices=chosen.indices)
        np.testing.assert_array_equal(again.indices, chosen.indices)
        np.testing.assert_allclose(again.weights, chosen.weights, rtol=1e-6)
    other = choose(chosen.scores, 1, "straight_through", indices=chosen.indices)
    np.testing.assert_array_equal(other.weights, np.ones((3, 1, 2)))


def test_noise_enters_the_weights_of_the_published_gate_alone():
    noise = jnp.flip(SCORES, axis=-1) * 3
    for gate, weighed in (("softmax", SCORES), ("noisy_softmax", SCORES + noise)):
        chosen = choose(SCORES, 2, gate, noise=noise)
        np.testing.assert_array_equal(chosen.indices, jnp.argsort(-(SCORES + noise))[:, :2])
        expected = jnp.take_along_axis(jax.nn.softmax(weighed), chosen.indices, axis=-1)
        np.testing.assert_allclose(chosen.weights, expected, rtol=1e-6)
        # They are shares of all experts', and do not add up to 1.
        assert np.any(np.sum(chosen.weights, axis=-1) < 0.99)
        np.testing.assert_array_equal(chosen.scores, SCORES)
