"""The step and the optimizers that a config's words become."""

import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.runs import build, recipe
from advmoe_jax.training import methods
from advmoe_jax.training.balance import Balance


def test_seeds_share_a_step(config, tiny):
    def shared(**changes):
        changed = config.copy_and_resolve_references()
        changed.update(changes)
        return recipe.optimizers_and_step(changed, tiny(num_experts=2)[0], 10)[1]

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
        threat=build.threat(config),
        balance=Balance(switch=0.01, warmup_steps=20),
    )
    assert recipe.step_settings(config, steps_per_epoch=10) == expected
    config.method, config.pruning.epochs = "hydra", 3
    assert recipe.step_settings(config, 10) == expected._replace(pruning_steps=30)


def test_parts_have_the_optimizers_that_the_config_means(config, tiny):
    config.optimizer.router.schedule = "wrong"
    assert recipe.optimizers_and_step(config, tiny(num_experts=1)[0], 10)[0].keys() == {"backbone"}
    with pytest.raises(UserError, match=r"optimizer\.router\.schedule='wrong'"):
        recipe.optimizers_and_step(config, tiny(num_experts=2)[0], 10)


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("defence", ["main", "max_average"])
def test_a_training_attack_of_no_length_is_refused(config, tiny, mode, defence):
    config.method, config.exits.defence = "multi_exit", defence
    config.attack.mode, config.attack.step_size = mode, -0.1
    network = tiny(num_experts=1)[0]
    with pytest.raises(UserError, match=r"config\.attack: step_size=-0.1 must be positive"):
        recipe.optimizers_and_step(config, network, 10)
