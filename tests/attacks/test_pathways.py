"""The attack on pathways within reach, on functions small enough to know the answer by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import linf, worst_pathway

THREAT = linf(0.05)
KEY = jax.random.key(0)


def test_pathways_within_reach(masked):
    function, images, reachable = masked
    labels = jnp.zeros(len(images), int)
    found = jax.jit(partial(worst_pathway(THREAT, num_steps=5), function))(images, labels, KEY)
    assert found.routes.shape == (len(images), 3, 1, 1)
    np.testing.assert_array_equal(found.robust, ~reachable)
    # The first route is the clean one, which nothing fools here.
    assert not found.routes[:, 0].any() and not found.fooled[:, 0].any()
    np.testing.assert_array_equal((found.routes == 1).any(axis=(1, 2, 3)), reachable)
    frozen = worst_pathway(THREAT, num_steps=5, frozen=True)
    assert jax.jit(partial(frozen, function))(images, labels, KEY).robust.all()


def test_a_pathway_that_errs_only_where_the_network_leaves_it(leaving):
    function, images, labels = leaving
    found = jax.jit(partial(worst_pathway(THREAT, frozen=True), function))(images, labels, KEY)
    assert not found.robust.any() and not found.network_fooled.any()
    logits = function.follow(found.adversarial, found.routes[:, 0])
    assert np.all(np.argmax(logits, axis=1) == 1) and np.all(function(images)[:, 0] >= 0)


@pytest.mark.slow
def test_several_decisions_of_several_choices(two_decisions, mixtures):
    function, images = two_decisions, jnp.asarray(mixtures.images)
    labels = jnp.argmax(function(images), axis=1)
    found = jax.jit(partial(worst_pathway(THREAT, num_steps=5), function))(images, labels, KEY)
    assert found.routes.shape == (24, 4, 2, 2) and found.fooled.shape == (24, 4)
    moved = np.any(found.routes != found.routes[:, :1], axis=(2, 3))
    assert moved.sum() > 5 and found.fooled[moved].any()
    np.testing.assert_array_equal(
        found.network_fooled, np.argmax(function(found.adversarial), axis=1) != labels
    )
    before = np.sort(function.classify(images).indices)
    np.testing.assert_array_equal(found.routes[:, 0], before)


def test_wrong_settings():
    with pytest.raises(ValueError, match="num_steps=0"):
        worst_pathway(THREAT, search_steps=0)
