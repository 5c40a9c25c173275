"""Attacks on the router, on functions small enough to know the answer by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import apgd, joint_attack, linf, pgd, route_attack

THREAT = linf(0.05)
KEY = jax.random.key(0)


def fooled_by(attack, function, images, labels):
    found = jax.jit(partial(attack, function))(images, labels, KEY)
    assert np.abs(found - images).max() <= 0.05 * (1 + 1e-5)
    return np.asarray(jnp.argmax(function(found), axis=1) != labels)


@pytest.mark.parametrize("make", [route_attack, joint_attack])
def test_a_route_that_gradients_do_not_see(masked, make):
    """Every image within reach is found, and no other."""
    function, images, reachable = masked
    labels = jnp.zeros(len(images), int)
    attack = make(THREAT, num_steps=20)
    np.testing.assert_array_equal(fooled_by(attack, function, images, labels), reachable)


def test_the_loss_s_own_gradient_finds_none(masked):
    labels = jnp.zeros(len(masked.images), int)
    attack = pgd(THREAT, num_steps=20, step_size=0.02, start="none")
    assert not fooled_by(attack, masked.function, masked.images, labels).any()


def test_several_decisions(two_decisions, mixtures):
    function, images = two_decisions, jnp.asarray(mixtures.images)
    labels = jnp.argmax(function(images), axis=1)
    before = np.sort(function.classify(images).indices)
    rerouted = jax.jit(partial(route_attack(THREAT, num_steps=10), function))(images, labels, KEY)
    after = np.sort(function.classify(rerouted).indices)
    assert np.mean(np.any(after != before, axis=(1, 2))) > 0.5


def test_wrong_settings(mixtures):
    with pytest.raises(ValueError, match="num_steps=0"):
        route_attack(THREAT, num_steps=0)


def test_where_every_expert_is_chosen_no_route_can_be_left(mixtures):
    function, images = mixtures.random(3), jnp.asarray(mixtures.images)
    labels = jnp.argmax(function(images), axis=1)
    few, many = (
        jax.jit(partial(route_attack(THREAT, num_steps=steps), function))(images, labels, KEY)
        for steps in (1, 5)
    )
    np.testing.assert_array_equal(few, many)  # the random start
    # What is left of the other one is the cross-entropy.
    both, alone = (
        jax.jit(partial(attack, function))(images, labels, KEY)
        for attack in (joint_attack(THREAT, num_steps=5), apgd(THREAT, num_steps=5))
    )
    np.testing.assert_allclose(both, alone, atol=1e-6)
