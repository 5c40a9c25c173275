"""What is measured of routes, by hand; the same for arrays of JAX and NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.routing import measures

# Four images, two decisions, two of three experts each.
CLEAN = np.array([[[0, 1], [2, 0]], [[0, 2], [2, 1]], [[1, 0], [2, 0]], [[0, 1], [0, 2]]])
ATTACKED = CLEAN.copy()
ATTACKED[0, 0] = [1, 0]


@pytest.mark.parametrize("arrays", [np.asarray, jnp.asarray])
def test_by_hand(arrays):
    clean, attacked = arrays(CLEAN), arrays(ATTACKED)
    np.testing.assert_allclose(
        measures.load(clean, 3), [[4 / 8, 3 / 8, 1 / 8], [3 / 8, 1 / 8, 4 / 8]]
    )
    np.testing.assert_allclose(measures.agreement(clean, attacked), [3 / 4, 1])
    confusion = measures.confusion(clean, attacked, 3)
    np.testing.assert_allclose(confusion[0], [[2 / 4, 1 / 4, 0], [0, 1 / 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(confusion.sum((1, 2)), [1, 1])


def test_a_choice_that_was_dropped_has_not_survived():
    dropped = CLEAN.copy()
    dropped[:2, 0, 0] = -1
    np.testing.assert_allclose(measures.agreement(dropped, dropped), [2 / 4, 1])


def test_entropy_is_in_nats():
    scores = jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]])
    np.testing.assert_allclose(measures.entropy(scores), [[np.log(2)], [0]], atol=1e-6)


def test_layers_are_told_apart_where_there_are_several():
    load = measures.load(CLEAN, 3)
    several = measures.by_decision({"load": load})
    np.testing.assert_allclose(several["load"], load.mean(axis=0))
    np.testing.assert_array_equal(several["layers"]["load"], load)
    assert "layers" not in measures.by_decision({"load": load[:1]})


def test_a_collapsed_router_is_told_of():
    assert measures.collapse_warnings(None, "here") == []
    assert measures.collapse_warnings({"load": [0.5, 0.5]}, "here") == []
    (warning,) = measures.collapse_warnings({"load": [0.995, 0.005]}, "in epoch 3")
    assert warning.startswith("expert 1 got 0.50% of the images in epoch 3: ")
    layers = {"load": [[0.5, 0.5], [1.0, 0.0]]}
    (warning,) = measures.collapse_warnings({"load": [0.7, 0.3], "layers": layers}, "here")
    assert warning.startswith("in 1 of 2 MoE layers (1) an expert got less than 1%")
