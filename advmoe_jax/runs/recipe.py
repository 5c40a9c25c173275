"""A config's words turned into the step of its method, and the optimizers of all parts."""

from functools import lru_cache
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import EXPERT_AXIS, batch_axes
from advmoe_jax.runs import build
from advmoe_jax.training import methods
from advmoe_jax.training.balance import Balance
from advmoe_jax.training.optimizers import OptimizerSettings, create_optimizer
from advmoe_jax.training.state import Optimizers

# Under what name a config has the optimizer of a part; every other part's is ``experts``.
_OPTIMIZER_OF = {"router": "router", "scores": "router"}


class _Recipe(NamedTuple):
    """All that optimizers and step follow from, besides the network."""

    method: str
    num_epochs: int
    steps_per_epoch: int
    pruning_epochs: int
    microbatches: int
    axes: tuple[str, ...]
    attack: methods.AttackSettings
    settings: methods.Settings
    optimizers: tuple[tuple[str, OptimizerSettings], ...]


def step_settings(config: ConfigDict, steps_per_epoch: int) -> methods.Settings:
    """What the losses of a run weigh; what a config counts in epochs is counted in steps here."""
    loss, balance = config.loss.to_dict(), config.balance.to_dict()
    return methods.Settings(
        pruning_steps=_pruning_epochs(config) * steps_per_epoch,
        awp_warmup_steps=round(loss.pop("awp_warmup_epochs") * steps_per_epoch),
        ema_decay=config.ema_decay,
        class_experts=tuple(loss.pop("class_experts")),
        threat=build.threat(config),
        frozen=config.start.frozen,
        exits=methods.ExitSettings(
            defence=config.exits.defence,
            weights=tuple(config.exits.weights),
            objective=config.exits.objective,
            attack_mode=config.attack.mode,
        ),
        balance=Balance(
            warmup_steps=round(balance.pop("warmup_epochs") * steps_per_epoch), **balance
        ),
        **loss,
    )


def _pruning_epochs(config: ConfigDict) -> int:
    is_pruned = methods.method(config.method).start and "pruning" in config
    return config.pruning.epochs if is_pruned else 0


def optimizers_and_step(
    config: ConfigDict, network: Network, steps_per_epoch: int
) -> tuple[Optimizers, methods.Step]:
    """The optimizers of every part, and the method's step, mapped over the mesh's axes.

    Raises:
        UserError: if the method does not suit the network, or a value cannot be used.
    """
    recipe = _Recipe(
        method=config.method,
        num_epochs=config.num_epochs,
        steps_per_epoch=steps_per_epoch,
        pruning_epochs=_pruning_epochs(config),
        microbatches=config.microbatches,
        axes=batch_axes(config.expert_shards),
        attack=methods.AttackSettings(
            build.threat(config), config.attack.num_steps, config.attack.step_size
        ),
        settings=step_settings(config, steps_per_epoch),
        optimizers=tuple(
            (name, OptimizerSettings(**values.to_dict() | {"drops": tuple(values.drops)}))
            for name, values in config.optimizer.items()
        ),
    )
    return _made(recipe, network)


# The same step for the same words: runs that differ in seed and data alone share what is compiled.
@lru_cache(maxsize=16)
def _made(recipe: _Recipe, network: Network) -> tuple[Optimizers, methods.Step]:
    method = methods.method(recipe.method)
    method.check(network, recipe.settings)
    lengths = method.lengths(recipe.num_epochs, recipe.pruning_epochs)
    settings: dict[str, Any] = dict(recipe.optimizers)
    optimizers = {}
    for part in network.parts:
        group = _OPTIMIZER_OF.get(part, "experts")
        length = recipe.steps_per_epoch, lengths.get(part, recipe.num_epochs)
        sharded = network.stacked[part] if EXPERT_AXIS in recipe.axes else None
        optimizers[part] = create_optimizer(group, settings[group], *length, sharded)
    try:
        attack = method.attack(recipe.attack, recipe.settings)
    except ValueError as error:
        raise UserError(f"config.attack: {error}") from None
    step = methods.create_step(
        recipe.method,
        network,
        optimizers,
        attack,
        recipe.settings,
        recipe.axes,
        recipe.microbatches,
    )
    return optimizers, step
