"""The warnings of a router that has collapsed."""

import pytest

from advmoe_jax.routing.measures import COLLAPSED, collapse_warnings


@pytest.mark.parametrize("load", [[0.5, 0.5], [COLLAPSED, 1 - COLLAPSED], [0.01, 0.98, 0.01]])
def test_no_warning_while_every_expert_works(load):
    assert collapse_warnings({"load": load}, "in epoch 3") == []


def test_one_warning_for_each_unused_expert():
    first, second = collapse_warnings({"load": [0.0, 0.9915, 0.0085]}, "in epoch 3")
    assert first.startswith("expert 0 got 0.00% of the images in epoch 3: the router has collapsed")
    assert second.startswith("expert 2 got 0.85% of the images in epoch 3: the router")
    assert "\n" not in first + second


def test_one_warning_for_all_layers_that_are_routed_by_themselves():
    routing = {"load": [0.25, 0.75], "layers": {"load": [[0.5, 0.5], [0.0, 1.0]]}}
    (warning,) = collapse_warnings(routing, "in epoch 3")
    assert warning.startswith("in 1 of 2 MoE layers (1) an expert got less than 1% of the images")
    routing["layers"]["load"] = [[0.5, 0.5]] * 2
    assert collapse_warnings(routing, "in epoch 3") == []


def test_a_dense_network_is_not_warned_of():
    assert collapse_warnings(None, "in epoch 3") == []
