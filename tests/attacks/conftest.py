"""Two small networks of the digits, one trained as usual and one adversarially."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from advmoe_jax.attacks import Answer, Routed, cross_entropy, linf, pgd

EPSILON = 0.1


class Trained(NamedTuple):
    """A two-layer perceptron and 500 test images it has not seen."""

    weights: list
    images: jax.Array
    labels: jax.Array

    @property
    def function(self):
        """Its weights are arguments of what is compiled."""
        return jax.tree_util.Partial(perceptron, self.weights)

    def accuracy(self, images):
        logits = perceptron(self.weights, jnp.asarray(images))
        return float(np.mean(np.argmax(logits, axis=1) == self.labels[: len(images)]))


@jax.jit
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


def mixture(scores_of, experts, top_k=1):
    """A ``Routed`` with one decision: experts are flat -> logits, ``scores_of`` flat -> [B, N]."""

    def flat(images):
        return images.reshape(len(images), -1) - 0.5

    def everyone(images):
        return jnp.stack([expert(flat(images)) for expert in experts], axis=1)

    def weigh(scores):
        return jnp.sum(jax.nn.one_hot(jax.lax.top_k(scores, top_k)[1], len(experts)), axis=-2)

    def mix(images, weights):
        return jnp.einsum("bn,bnk->bk", weights[:, 0], everyone(images))

    def follow(images, indices):
        return mix(images, jnp.sum(jax.nn.one_hot(indices, len(experts)), axis=-2))

    def classify(images):
        scores = scores_of(flat(images))[:, None]
        indices = jax.lax.top_k(scores, top_k)[1]
        return Answer(follow(images, indices), scores, indices)

    return Routed(classify, follow, mix, weigh)


def constant(*logits):
    """An expert that says the same of every image."""
    return lambda flat: jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(flat), len(logits)))


def random_mixture(top_k=1):
    """Three linear experts of three classes."""
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 8, 3)), jnp.float32)
    router = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)), jnp.float32)
    return mixture(lambda flat: flat @ router, [lambda x, w=w: x @ w for w in weights], top_k)


# Away from the ends of the pixel range, so that only the ball limits the attacker.
ROUTED_IMAGES = np.random.default_rng(0).uniform(0.3, 0.7, (24, 2, 2, 2)).astype(np.float32)


class Masked(NamedTuple):
    """Expert 0 says 0 whatever it sees, expert 1 says 1; nothing but the route can be attacked.

    The function, images that expert 0 sees, and which of them an attacker within 0.05 in linf can
    send to expert 1: linear scores move by at most epsilon times the l1 norm of the difference of
    their weights.
    """

    function: Routed
    images: jax.Array
    reachable: np.ndarray


@pytest.fixture(scope="session")
def masked():
    """``Masked``."""
    router = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    function = mixture(lambda flat: 100 * (flat @ router), [constant(2, 0), constant(0, 2)])
    flat = ROUTED_IMAGES.reshape(len(ROUTED_IMAGES), -1).astype(np.float64) - 0.5
    slope = np.asarray(router[:, 1] - router[:, 0], np.float64)
    gap = flat @ slope
    mine = gap < 0
    reachable = gap[mine] + 0.05 * np.abs(slope).sum() > 0
    assert 2 < reachable.sum() < mine.sum() - 2
    return Masked(function, jnp.asarray(ROUTED_IMAGES[mine]), reachable)


class Mixtures(NamedTuple):
    """What makes ``Routed`` functions, and images for them."""

    of: Callable[..., Routed]
    random: Callable[..., Routed]
    constant: Callable[..., Callable]
    images: np.ndarray


@pytest.fixture(scope="session")
def mixtures():
    """``Mixtures``."""
    return Mixtures(mixture, random_mixture, constant, ROUTED_IMAGES)


@pytest.fixture(scope="session")
def leaving():
    """Expert 0 is wrong on bright images, which the router sends to expert 1, who is right.

    The function, images and labels.
    """
    bright = jnp.ones(8) / 8

    def expert(flat):
        return jnp.stack([jnp.zeros(len(flat)), 50 * (flat @ bright)], axis=1)

    def scores(flat):
        return jnp.stack([-(flat @ bright), flat @ bright], axis=1)

    function = mixture(scores, [expert, constant(2, 0)])
    return function, jnp.full((3, 2, 2, 2), 0.48), jnp.zeros(3, int)


@pytest.fixture(scope="session")
def two_decisions():
    """Two decisions of three experts each, of which two are followed; logits add up."""
    router = jnp.asarray(np.random.default_rng(5).normal(size=(8, 2, 3)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, 8, 4)), jnp.float32)

    def flat(x):
        return x.reshape(len(x), -1) - 0.5

    def weigh(scores):
        return jnp.sum(jax.nn.one_hot(jax.lax.top_k(scores, 2)[1], 3), axis=-2)

    def mix(x, w):
        return jnp.einsum("bln,lnik,bi->bk", w, weights, flat(x))

    def follow(x, indices):
        return mix(x, jnp.sum(jax.nn.one_hot(indices, 3), axis=-2))

    def classify(x):
        scores = jnp.einsum("bi,iln->bln", flat(x), router)
        indices = jax.lax.top_k(scores, 2)[1]
        return Answer(follow(x, indices), scores, indices)

    return Routed(classify, follow, mix, weigh)
