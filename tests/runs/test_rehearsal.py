"""What is refused before any image is read."""

import jax
import pytest

from advmoe_jax import defaults, memory
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_shards": 2}, r"expert_shards=2 needs config\.family='vit': the experts of a CNN"),
        ({"family": "vit", "expert_shards": 3}, r"num_experts=8 is not a multiple.* say$"),
        ({"family": "vit", "expert_shards": 4, "num_devices": 2}, "does not divide the 2 devices"),
    ],
)
def test_experts_that_cannot_be_spread(config, changes, said):
    if "family" in changes:
        config = defaults.vit()
    config.update(changes)
    with pytest.raises(UserError, match=said):
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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"workers": 2}, r"data\.workers=2 decode what is streamed"),
        ({"crop_whole": True, "crop_area": 0.5}, r"data\.crop_whole=True cuts crops"),
        ({"crop_whole": True, "crop_area": 0.5, "stream": True, "image_size": 8}, "image files"),
    ],
)
def test_what_images_of_the_digits_cannot_be_streamed_with(config, values, said):
    assert config.data.source == "digits"
    config.data.update(values)
    with pytest.raises(UserError, match=said):
        rehearse(config)


def test_crops_of_whole_images_need_a_size_and_an_area(config):
    config.data.source, config.data.stream, config.data.crop_whole = "image_folder", True, True
    for size, area in ((0, 0.5), (8, 1.0)):
        config.data.image_size, config.data.crop_area = size, area
        with pytest.raises(UserError, match=r"and data\.crop_area below 1"):
            rehearse(config)
    config.data.image_size, config.data.crop_area = 8, 0.5
    rehearse(config)
