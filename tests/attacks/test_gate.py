"""Attacks through the gate, and what their surrogates are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import gate_attack, linf, through_gate

THREAT = linf(0.05)
KEY = jax.random.key(0)


def fooled_by(attack, function, images, labels):
    found = jax.jit(partial(attack, function))(images, labels, KEY)
    assert np.abs(found - images).max() <= 0.05 * (1 + 1e-5)
    return np.asarray(jnp.argmax(function(found), axis=1) != labels)


@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_a_route_that_gradients_do_not_see(masked, gate):
    """Every image within reach is found, and no other."""
    function, images, reachable = masked
    attack = gate_attack(THREAT, gate, num_steps=20)
    found = fooled_by(attack, function, images, jnp.zeros(len(images), int))
    np.testing.assert_array_equal(found, reachable)


def test_noise_draws_routes_by_a_softmax_of_the_scores(mixtures):
    scores = np.array([0.0, 0.6, 1.0])
    function = mixtures.of(
        lambda flat: jnp.broadcast_to(jnp.asarray(scores), (len(flat), 3)),
        [mixtures.constant(*row) for row in np.eye(3)],
    )
    keys = jax.random.split(KEY, 4000)
    hard = through_gate(function, "hard", noise=0.5)
    shares = np.mean(jax.jit(hard)(jnp.zeros((4000, 2, 2, 2)), keys), axis=0)
    expected = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_gates_without_noise_against_numpy(mixtures):
    weights = np.random.default_rng(3).normal(size=(3, 8, 3)).astype(np.float32)
    function = mixtures.random()
    keys = jax.random.split(KEY, len(mixtures.images))
    answer = function.classify(jnp.asarray(mixtures.images))
    flat = mixtures.images.reshape(len(mixtures.images), -1) - 0.5
    each = np.einsum("bi,nik->bnk", flat, weights)
    scores = np.asarray(answer.scores, np.float64)[:, 0]
    scaled = scores / (0.5 * np.ptp(scores, axis=1, keepdims=True))
    soft = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)

    def gate(name):
        return jax.jit(through_gate(function, name, noise=0.0, temperature=0.5))

    for name in ("hard", "straight_through"):
        np.testing.assert_allclose(gate(name)(mixtures.images, keys), answer.logits, atol=1e-5)
    np.testing.assert_allclose(
        gate("softmax")(mixtures.images, keys), np.einsum("bn,bnk->bk", soft, each), atol=1e-5
    )

    def gradient(of):
        return np.asarray(
            jax.jit(jax.grad(lambda x: jnp.sum(of(x)[:, 0])))(jnp.asarray(mixtures.images))
        )

    true = gradient(function)
    np.testing.assert_allclose(gradient(lambda x: gate("hard")(x, keys)), true, atol=1e-5)
    # Beyond the true gradient, what the route would be worth: the derivative of the softmax.
    beyond = gradient(lambda x: gate("straight_through")(x, keys)) - true

    def worth(x):
        fixed = jnp.asarray(each[..., 0])
        here = function.classify(x).scores[:, 0]
        span = jnp.asarray(np.ptp(scores, axis=1, keepdims=True), jnp.float32)
        return jnp.sum(jax.nn.softmax(here / (0.5 * span)) * fixed)

    by_hand = jax.jit(jax.grad(worth))(jnp.asarray(mixtures.images))
    np.testing.assert_allclose(beyond, by_hand, atol=1e-4)
    assert np.abs(beyond).max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gate": "sigmoid"}, "gate 'sigmoid' is unknown; choose one of"),
        ({"eot_samples": 0}, "eot_samples=0 must be positive"),
        ({"loss": "kl"}, "compare with labels"),
        ({"temperature": 0.0}, "temperature=0.0 positive"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        gate_attack(THREAT, **settings)
