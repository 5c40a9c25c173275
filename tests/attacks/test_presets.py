"""Each named setting is what its paper says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import (
    cross_entropy,
    cw,
    deepfool,
    eot_pgd,
    ffgsm,
    fgsm,
    l1,
    l2,
    linf,
    mi_fgsm,
    pgd,
    r_fgsm,
    tpgd,
)
from advmoe_jax.attacks.constraints import distance, signs_start

THREAT = linf(0.1)
MIDDLE = jnp.full((8, 4, 4, 1), 0.5)
MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
LABELS = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1])


def linear(images):
    return images.reshape(len(images), -1) @ MATRIX


def run(attack, images=MIDDLE, labels=LABELS, function=linear):
    return jax.jit(partial(attack, function))(images, labels, jax.random.key(0))


def signs():
    gradient = jax.grad(lambda x: jnp.sum(cross_entropy(linear(x), LABELS)))(MIDDLE)
    return np.sign(gradient)


def test_r_fgsm_takes_two_half_steps():
    """Pixels where the random half agrees with the gradient end at epsilon, others at 0."""
    moved = np.round((run(r_fgsm(THREAT)) - MIDDLE) * signs() / 0.1, 4)
    values, counts = np.unique(moved, return_counts=True)
    np.testing.assert_allclose(values, [0, 1], atol=2e-2)
    assert 0.3 < counts[0] / counts.sum() < 0.7
    with pytest.raises(ValueError, match=r"alpha=0.1 must lie between 0 and epsilon=0.1"):
        r_fgsm(THREAT, alpha=0.1)


@pytest.mark.parametrize("make", [l2, l1])
def test_r_fgsm_is_as_long_as_it_says_in_every_norm(make):
    threat = make(0.4)
    start = signs_start(threat, MIDDLE, jax.random.split(jax.random.key(0), 8), 0.3)
    np.testing.assert_allclose(distance(threat, start, MIDDLE), 0.3, rtol=1e-5)
    assert np.all(distance(threat, run(r_fgsm(threat)), MIDDLE) <= 0.4 * (1 + 1e-5))


def test_r_fgsm_with_an_epsilon_that_is_traced():
    def moved(epsilon):
        return r_fgsm(linf(epsilon))(linear, MIDDLE, LABELS, jax.random.key(0))

    np.testing.assert_allclose(jax.jit(moved)(0.1), run(r_fgsm(THREAT)), atol=1e-6)


def test_ffgsm_starts_in_the_ball_and_steps_beyond_it():
    moved = np.asarray((run(ffgsm(THREAT)) - MIDDLE) * signs() / 0.1)
    # From u in [-1, 1] to min(u + 1.25, 1); the sign is that of the gradient at u.
    moved = np.abs(moved)
    assert moved.min() > 0.2 and np.mean(moved > 0.999) == pytest.approx(0.625, abs=0.15)


def test_mi_fgsm_is_pgd_with_momentum():
    expected = pgd(THREAT, num_steps=5, step_size=0.02, start="none", momentum=1.0)
    np.testing.assert_array_equal(run(mi_fgsm(THREAT, num_steps=5)), run(expected))


def test_tpgd_needs_no_labels():
    result = jax.jit(lambda x: tpgd(THREAT, step_size=0.02)(linear, x, None, jax.random.key(0)))
    assert np.abs(result(MIDDLE) - MIDDLE).mean() > 0.05


def test_eot_pgd_follows_the_mean_of_noisy_gradients():
    def noisy(images, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (16, 3)))(keys)
        flat = images.reshape(len(images), -1)
        return jnp.einsum("bi,bij->bj", flat, MATRIX + noise)

    def agreement(samples):
        attack = eot_pgd(THREAT, eot_samples=samples, num_steps=1, step_size=0.3)
        return np.mean(np.sign(run(attack, function=noisy) - MIDDLE) == signs())

    assert agreement(64) > agreement(1) + 0.05
    with pytest.raises(ValueError, match="eot_samples=0 must be positive"):
        eot_pgd(THREAT, eot_samples=0, num_steps=1, step_size=0.1)


@pytest.mark.parametrize("threat", [linf(0.2), l2(0.8), l1(4.0)])
def test_targeted_pgd_reaches_its_class(threat, assert_valid):
    attack = pgd(threat, num_steps=40, step_size=threat.epsilon / 5, targeted=True)
    result = run(attack)
    assert_valid(threat, result, MIDDLE)
    enough = 0.5 if threat.norm == "l1" else 0.9  # one pixel a step
    assert np.mean(np.argmax(linear(result), axis=1) == LABELS) > enough
    with pytest.raises(ValueError, match="needs a loss of the labels"):
        pgd(threat, num_steps=1, step_size=0.1, loss="kl", targeted=True)


def test_deepfool_on_a_linear_map_crosses_in_one_step():
    labels = jnp.argmax(linear(MIDDLE + 0.0), axis=1)
    result = run(deepfool(l2(np.inf), num_steps=1), labels=labels)
    assert np.all(np.argmax(linear(result), axis=1) != labels)


@pytest.mark.parametrize("attack", [cw, deepfool])
def test_in_the_ball_or_the_clean_image(networks, assert_valid, attack):
    network, threat = networks["robust"], l2(0.5)
    images, labels = network.images[:100], network.labels[:100]
    settings = (
        {"num_steps": 60, "binary_search_steps": 4, "initial_weight": 1} if attack is cw else {}
    )
    result = run(attack(threat, **settings), images, labels, network.function)
    assert_valid(threat, result, images)
    fooled = np.argmax(network.function(result), axis=1) != labels
    clean = np.all(result == images, axis=(1, 2, 3))
    assert np.all(fooled | clean) and 5 < np.sum(fooled & ~clean) < 95


def test_cw_reaches_its_class(networks):
    network = networks["standard"]
    images, wanted = network.images[:50], (network.labels[:50] + 1) % 10
    attack = cw(
        l2(np.inf),
        num_steps=100,
        binary_search_steps=2,
        initial_weight=10,
        targeted=True,
        learning_rate=0.1,
    )
    result = run(attack, images, wanted, network.function)
    assert np.mean(np.argmax(network.function(result), axis=1) == wanted) > 0.9


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: cw(linf(0.1)), "defined for l2, not for linf"),
        (lambda: cw(l2(0.1), num_steps=0), "num_steps=0"),
        (lambda: deepfool(l1(0.1)), "defined for linf and l2, not for l1"),
        (lambda: deepfool(l2(0.1), candidates=1), "candidates=1 at least 2"),
        (lambda: pgd(linf(0.1), num_steps=1, step_size=1, eot_samples=-1), "eot_samples=-1"),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_fgsm_in_l1_moves_one_pixel():
    changed = np.sum(run(fgsm(l1(0.3))) != MIDDLE, axis=(1, 2, 3))
    np.testing.assert_array_equal(changed, 1)


def test_cw_on_pixels_that_rounding_has_put_beyond_the_range():
    images = MIDDLE.at[:, 0, 0].set(1 + 5e-7)
    labels = jnp.argmax(linear(images), axis=1)
    found = cw(l2(4.0), num_steps=50, binary_search_steps=4, learning_rate=0.1)(
        linear, images, labels, jax.random.key(0)
    )
    assert np.all(np.isfinite(found))
    assert np.mean(np.argmax(linear(found), axis=1) != labels) > 0.5
