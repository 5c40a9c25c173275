"""Load, entropy and agreement against counts by hand."""

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.evaluation.routing import (
    agreement,
    layer_agreement,
    routing_summary,
)


def outcome(choices, entropy=None):
    if choices is not None:
        choices = np.array(choices, np.int32)
        entropy = np.zeros(len(choices)) if entropy is None else np.array(entropy)
    return Outcome(np.array([True]), np.array([0]), choices, entropy, 1.0)


def test_load_and_entropy():
    summary = routing_summary(outcome([[0], [2], [2], [2]], [0.0, 0.5, 0.5, 1.0]), 4)
    assert summary == {"load": [0.25, 0.0, 0.75, 0.0], "entropy": 0.5}


def test_load_of_several_choices_counts_each():
    summary = routing_summary(outcome([[0, 1], [1, 2]]), 3)
    assert summary["load"] == [0.25, 0.5, 0.25]


def test_agreement_is_of_first_choices():
    clean, attacked = (
        outcome([[0, 1], [1, 2], [2, 0], [0, 1]]),
        outcome([[0, 2], [2, 1], [2, 0], [1, 0]]),
    )
    assert agreement(clean, attacked) == 0.5
    assert agreement(clean, clean) == 1.0


def test_layers_that_are_routed_by_themselves():
    clean, attacked = (
        outcome([[[0], [1]], [[1], [1]], [[0], [1]], [[1], [1]]], [[0.0, 0.5]] * 4),
        outcome([[[0], [1]], [[1], [0]], [[0], [1]], [[1], [0]]], [[0.0, 0.5]] * 4),
    )
    summary = routing_summary(clean, 2)
    assert summary["load"] == [0.25, 0.75] and summary["entropy"] == 0.25
    assert summary["layers"] == {"load": [[0.5, 0.5], [0.0, 1.0]], "entropy": [0.0, 0.5]}
    assert agreement(clean, attacked) == 0.75
    assert layer_agreement(clean, attacked) == [1.0, 0.5]


def test_a_dense_network_has_none():
    dense = outcome(None)
    assert routing_summary(dense, 1) is None
    assert agreement(dense, dense) is None
