"""What is made of a config's words."""

import numpy as np
import pytest

from advmoe_jax.data.batch import Mixture
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import data_mesh
from advmoe_jax.runs import build
from advmoe_jax.training import methods
from advmoe_jax.training.balance import Balance


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


def test_seeds_share_a_step(config, tiny):
    def shared(**changes):
        changed = config.copy_and_resolve_references()
        changed.update(changes)
        return build.optimizers_and_step(changed, tiny(num_experts=2)[0], 10)[1]

    first = shared()
    assert shared(seed=5) is first  # though its network was made anew
    assert shared(num_epochs=9) is not first
    assert shared(loss={"beta": 1.0}) is not first


def test_settings_of_a_config_are_those_of_the_step(config):
    config.ema_decay, config.loss.awp_warmup_epochs, config.balance.warmup_epochs = 0.9, 1.5, 2.0
    config.loss.label_smoothing, config.balance.switch, config.method = 0.1, 0.01, "trades"
    expected = methods.Settings(
        beta=6.0,
        alpha=6.0,
        router_objective="assignment",
        label_smoothing=0.1,
        awp_warmup_steps=15,
        ema_decay=0.9,
        balance=Balance(switch=0.01, warmup_steps=20),
    )
    assert build.step_settings(config, steps_per_epoch=10) == expected
    config.method, config.pruning.epochs = "hydra", 3
    assert build.step_settings(config, 10) == expected._replace(pruning_steps=30)


def test_parts_have_the_optimizers_that_the_config_means(config, tiny):
    config.optimizer.router.schedule = "wrong"
    assert build.optimizers_and_step(config, tiny(num_experts=1)[0], 10)[0].keys() == {"backbone"}
    with pytest.raises(UserError, match=r"optimizer\.router\.schedule='wrong'"):
        build.optimizers_and_step(config, tiny(num_experts=2)[0], 10)


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


def test_images_are_described(config):
    said = build.load_images(config).described
    assert said == "digits: 1,293 training, 144 validation, 360 test images of 8x8x1, 10 classes"
