"""Places of experts: how many, and who gets one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.routing.capacity import Capacity, drop, has_place, places
from advmoe_jax.routing.choice import choose


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "ratio", "expected"),
    [(400, 2, 32, 1.05, 28), (1160, 2, 8, 1.5, 436), (2308, 2, 8, 1.5, 868)],
)
def test_places_are_the_published_ones(tokens, k, experts, ratio, expected):
    assert places(tokens * k, experts, ratio) == expected


def served_by_hand(indices, order, most):
    """All first choices in order, then all second ones."""
    used, served = {}, np.zeros(indices.shape, bool)
    for choice in range(indices.shape[1]):
        for token in order:
            expert = int(indices[token, choice])
            served[token, choice] = used.get(expert, 0) < most
            used[expert] = used.get(expert, 0) + 1
    return served


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("most", [1, 4, 9])
def test_first_choices_come_first_then_order_or_priority(priority, most):
    scores = jax.random.normal(jax.random.key(most), (20, 3))
    routing = choose(scores, 2, "softmax")
    found = has_place(routing.indices, routing.weights, 3, most, priority)
    weights = np.asarray(routing.weights[:, 0])
    order = np.argsort(-weights, kind="stable") if priority else range(20)
    expected = served_by_hand(np.asarray(routing.indices), order, most)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < expected.size


def test_groups_do_not_share_places_and_indivisible_batches_have_smaller_ones():
    # Everybody wants expert 0, of which each group of 4 tokens has 4 places at ratio 2.
    scores = jnp.tile(jnp.array([3.0, 0.0]), (6, 2, 1))
    routing = choose(scores, 1, "softmax")
    for images, kept in ((1, 12), (2, 12), (4, 12), (3, 12), (6, 12)):
        dropped = drop(routing, 2.0, Capacity(images=images))
        assert int(jnp.sum(dropped.weights > 0)) == kept
    # Half of that: 4 places for 2, 4 and 6 tokens, and 8 for the whole batch of 12.
    for images, kept in ((1, 12), (4, 12), (3, 8), (6, 8)):
        dropped = drop(routing, 1.0, Capacity(images=images))
        assert int(jnp.sum(dropped.weights > 0)) == kept
        np.testing.assert_array_equal(dropped.indices, routing.indices)
