"""What is chosen from scores, and the network that gives them."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import count_macs, count_params
from advmoe_jax.models.layers import Context
from advmoe_jax.models.router import Router
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


def test_published_size():
    model = nnx.eval_shape(lambda: Router(3, 2, width=16, blocks=3, rngs=nnx.Rngs(0)))
    assert count_params(nnx.state(model, nnx.Param)) == 269_202

    def scores(state, images):
        return nnx.merge(nnx.graphdef(model), state)(images, Context())

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    assert count_macs(scores, nnx.state(model), images) == 40_550_528


@pytest.mark.parametrize(("channels", "experts", "shape"), [(1, 2, (8, 8)), (3, 5, (9, 7))])
def test_scores_of_any_images(channels, experts, shape):
    def run(images):
        return Router(channels, experts, width=4, blocks=1, rngs=nnx.Rngs(0))(images, Context())

    images = jax.ShapeDtypeStruct((2, *shape, channels), jnp.bfloat16)
    scores = jax.eval_shape(run, images)
    assert scores.shape == (2, experts) and scores.dtype == jnp.float32


def test_scores_depend_on_the_image_alone():
    model = nnx.eval_shape(lambda: Router(1, 3, width=4, blocks=1, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.1, 1, s.shape), s.dtype), state)

    @jax.jit
    def run(images):
        return nnx.merge(graph, state)(images, Context())

    images = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32)
    scores = run(images)
    assert np.ptp(scores, axis=0).min() > 0
    changed = run(images.at[2].set(0.0))
    np.testing.assert_array_equal(np.any(changed != scores, axis=1), [False, False, True, False])


def test_without_the_surrogate_the_gate_has_its_true_derivative():
    np.testing.assert_array_equal(choose(SCORES, surrogate=False).weights, np.ones((3, 1)))
    gradient = jax.grad(lambda s: jnp.sum(choose(s, surrogate=False).weights))(SCORES)
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))
    soft = choose(SCORES, gate="softmax", surrogate=False)
    np.testing.assert_array_equal(soft.weights, choose(SCORES, gate="softmax").weights)
