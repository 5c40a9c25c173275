"""Throughput: every network is timed on its own parameters, on all devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.evaluation import throughput
from advmoe_jax.evaluation.timing import Timing
from advmoe_jax.parallel import data_mesh


@pytest.mark.slow
def test_images_per_second_of_each_network(tiny, monkeypatch):
    networks = {
        ("dense", 0): tiny(num_experts=1),
        ("moe", 0): tiny(num_experts=2),
        ("moe", 1): tiny(num_experts=2, seed=1),
    }
    images = np.random.default_rng(0).integers(256, size=(16, 8, 8, 1)).astype(np.uint8)
    answers = {}

    def alternate(calls, *_):
        answers.update({name: np.asarray(call()) for name, call in calls.items()})
        return {name: Timing((4.0, 2.0, 1.0)) for name in calls}

    monkeypatch.setattr(throughput, "alternate", alternate)
    found = throughput.images_per_second(networks, images, data_mesh(4))
    assert found == pytest.approx(dict.fromkeys(networks, 16 / 2.0))
    for name, (network, params, stats) in networks.items():
        logits = network.apply(params, stats, jnp.asarray(images, jnp.float32) / 255)[0].logits
        np.testing.assert_array_equal(answers[name], np.argmax(logits, axis=1))
