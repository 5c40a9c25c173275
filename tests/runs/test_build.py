"""What is made of a config's words."""

import numpy as np
import pytest

from advmoe_jax.data.batch import Mixture
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import data_mesh
from advmoe_jax.runs import build


def test_extra_images_stand_behind_the_training_images(config, tmp_path):
    images = build.load_images(config)
    extra = images.train.images[:30] // 2, images.train.labels[:30]
    np.savez(tmp_path / "extra.npz", images=extra[0], labels=extra[1])
    config.data.extra_path, config.data.extra_share = str(tmp_path / "extra.npz"), 0.3
    config.data.cutmix = 0.5
    feed = build.training_feed(config, images, data_mesh(1))
    assert feed.recipe.mixture == Mixture(30, round(0.3 * 64), 0.5, 1.0, 10)
    for part, own, more in zip(feed.data, images.train, extra, strict=True):
        np.testing.assert_array_equal(part, np.concatenate([own, more]))
    assert feed.steps_per_epoch == len(images.train.labels) // (64 - 19)
    for share, message in ((0.0, "go together"), (0.001, "at least one of each kind")):
        config.data.extra_share = share
        with pytest.raises(UserError, match=message):
            build.training_feed(config, images, data_mesh(1))


def test_attacks_that_nobody_typed_are_left_out_where_they_cannot_be(config):
    config.evaluation.attacks = "clean,pgd3,router"
    assert build.settled(config, typed=False).evaluation.attacks == "clean,pgd3"
    with pytest.raises(UserError, match="'router' is on the part 'router'; the network has"):
        build.settled(config, typed=True)
    config.model.num_experts = 2
    assert build.settled(config, typed=True).evaluation.attacks == "clean,pgd3,router"
    config.evaluation.attacks = "pdg3"
    with pytest.raises(UserError, match="attack 'pdg3' is unknown"):
        build.settled(config, typed=False)


def test_a_network_has_the_parts_that_its_config_promises(config):
    images = build.load_images(config)
    for changes in ({"num_experts": 2}, {"num_experts": 1}, {"num_experts": 1, "keep": 0.5}):
        config.model.update(changes)
        network, params, stats = build.create_network(config, images)
        assert set(network.parts) == set(params) == set(stats)
        assert set(network.parts) == set(build.architecture(config).parts)


def test_withheld_images_stand_in_for_test_images(config):
    usual = build.load_images(config)
    config.data.test_split = "withheld"
    found = build.load_images(config)
    np.testing.assert_array_equal(found.test.images, usual.validation.images)
    np.testing.assert_array_equal(found.train.images, usual.train.images)


def test_images_are_described(config):
    said = build.load_images(config).described
    assert said == "digits: 1,293 training, 144 validation, 360 test images of 8x8x1, 10 classes"
