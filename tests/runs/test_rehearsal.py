"""What is refused before any image is read."""

import jax
import pytest

from advmoe_jax import memory
from advmoe_jax.errors import UserError
from advmoe_jax.runs import build
from advmoe_jax.runs.rehearsal import check_start, rehearse


def test_what_can_be_trained_passes(config):
    rehearse(config)
    check_start(config)


def test_a_wrong_attack(config):
    for attacks in ("pdg3", "router"):
        config.evaluation.attacks = attacks
        with pytest.raises(UserError, match=f"attack '{attacks}'"):
            rehearse(config)


def test_the_memory_of_weights_gradients_and_momentum_counts(config, monkeypatch):
    params = build.network_shapes(config, 1, 10)[1]
    size = sum(4 * x.size for x in jax.tree.leaves(params))
    monkeypatch.setattr(memory, "machine_bytes", lambda: 3 * size)
    rehearse(config)
    config.ema_decay = 0.9
    with pytest.raises(UserError, match="make the network smaller"):
        rehearse(config)


def test_a_run_to_start_from_that_is_not_there(config, tmp_path):
    config.start.run = str(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        check_start(config)
    config.start.run, config.method = "", "hydra"
    with pytest.raises(UserError, match=r"pruning\.dense_run"):
        check_start(config)


def test_shapes_are_those_of_the_network_that_is_made(config):
    images = build.load_images(config)
    made = build.create_network(config, images)
    told = build.network_shapes(config, 1, 10)
    assert told[0] == made[0]
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), trees[1:]) for trees in (made, told)]
    assert shapes[0] == shapes[1]
