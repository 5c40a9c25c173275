"""Two small networks of the digits, one trained as usual and one adversarially."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from advmoe_jax.attacks import cross_entropy, linf, pgd

EPSILON = 0.1


class Trained(NamedTuple):
    """A two-layer perceptron and 500 test images it has not seen."""

    weights: list
    images: jax.Array
    labels: jax.Array

    @property
    def function(self):
        return jax.jit(partial(perceptron, self.weights))

    def accuracy(self, images):
        logits = perceptron(self.weights, jnp.asarray(images))
        return float(np.mean(np.argmax(logits, axis=1) == self.labels[: len(images)]))


def perceptron(weights, images):
    flat = images.reshape(len(images), -1) - 0.5
    return jax.nn.relu(flat @ weights[0] + weights[1]) @ weights[2] + weights[3]


def train(images, labels, epsilon, steps, hidden=64):
    """Adam on the cross-entropy, of PGD's images if epsilon is not 0."""
    rng = np.random.default_rng(0)
    sizes = images[0].size, hidden
    shapes = [sizes, (hidden,), (hidden, 10), (10,)]
    weights = [
        jnp.asarray(rng.normal(size=s) * (len(s) > 1) / np.sqrt(s[0]), jnp.float32) for s in shapes
    ]
    optimizer = optax.adam(3e-3)
    attack = pgd(linf(epsilon or 1), num_steps=5, step_size=epsilon / 3 or 1)

    @jax.jit
    def run(weights):
        def step(i, carry):
            weights, state = carry
            at = jax.random.randint(
                jax.random.fold_in(jax.random.key(0), i), (256,), 0, len(images)
            )
            x, y = images[at], labels[at]
            if epsilon:
                key = jax.random.fold_in(jax.random.key(1), i)
                x = attack(partial(perceptron, weights), x, y, key)
            gradients = jax.grad(lambda w: jnp.mean(cross_entropy(perceptron(w, x), y)))(weights)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(weights, updates), state

        return jax.lax.fori_loop(0, steps, step, (weights, optimizer.init(weights)))[0]

    return run(weights)


def _networks(images, labels, test_images, test_labels, steps):
    test = jnp.asarray(test_images, jnp.float32), jnp.asarray(test_labels, jnp.int32)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    return {
        "standard": Trained(train(images, labels, 0.0, steps), *test),
        "robust": Trained(train(images, labels, EPSILON, steps), *test),
    }


@pytest.fixture(scope="session")
def networks():
    """{"standard", "robust"} -> Trained, on scikit-learn's digits."""
    data = load_digits()
    images, labels = data.images[..., None] / 16, data.target
    order = np.random.default_rng(0).permutation(len(labels))
    fit, test = order[500:], order[:500]
    return _networks(images[fit], labels[fit], images[test], labels[test], 400)


@pytest.fixture(scope="session")
def mnist_networks():
    """The same on MNIST, from the directory that ADVMOE_DATA names."""
    archive = Path(os.environ.get("ADVMOE_DATA", "/nowhere")) / "mnist_png.tar.gz"
    if not archive.exists():
        pytest.skip("ADVMOE_DATA names no directory with mnist_png.tar.gz")
    from advmoe_jax.data.sources import load

    data = load("image_folder", str(archive))
    pick = np.random.default_rng(0).permutation(len(data.test.labels))[:500]
    fit, test = data.train, data.test
    return _networks(fit.images / 255, fit.labels, test.images[pick] / 255, test.labels[pick], 300)


def distances(norm, images, clean):
    """float64 [B], computed by NumPy."""
    delta = np.asarray(images, np.float64) - np.asarray(clean, np.float64)
    delta = np.abs(delta.reshape(len(delta), -1))
    if norm == "linf":
        return delta.max(axis=1)
    return delta.sum(axis=1) if norm == "l1" else np.sqrt((delta**2).sum(axis=1))


@pytest.fixture(scope="session")
def assert_valid():
    """(threat, images, clean): in the ball and in the pixel range, by NumPy in float64."""

    def check(threat, images, clean):
        assert images.shape == clean.shape and images.dtype == clean.dtype
        assert np.all(np.isfinite(images))
        assert np.min(images) >= threat.lower and np.max(images) <= threat.upper
        slack = 1e-5 * (threat.upper - threat.lower)
        far = distances(threat.norm, images, clean).max()
        assert far <= threat.epsilon * (1 + 1e-5) + slack

    return check
