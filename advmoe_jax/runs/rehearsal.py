"""What cannot be trained or evaluated whatever the images are, refused before any is read.

Nothing is computed and no array is made: a mistake is told within seconds, on any machine.
"""

import math

import jax
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax import storage
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.wanted import parse_attacks
from advmoe_jax.memory import check_fits
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import check_batch
from advmoe_jax.runs import build, directory, recipe
from advmoe_jax.runs.devices import training_mesh
from advmoe_jax.training import methods
from advmoe_jax.types import Tree

# Images and classes are not known yet; nothing that is checked here hangs on how many there are.
_STEPS, _CLASSES = 100, 10


def rehearse(config: ConfigDict) -> None:
    """Goes through all that a training follows from, but for the images.

    Args:
        config: of a run, checked and settled.

    Raises:
        UserError: if the config cannot be trained or evaluated, or the network, its gradients and
            its optimizers need more memory than there is.
    """
    mesh = training_mesh(config)
    _check_showing(config)
    check_batch("batch_size", config.batch_size, mesh, config.microbatches)
    build.check_stream(config)
    network, params = _stand_in(config)
    _check_memory(config, params)
    recipe.optimizers_and_step(config, network, _STEPS)
    parse_attacks(config.evaluation.attacks, build.protocol(config), network.parts)


def _check_showing(config: ConfigDict) -> None:
    if config.evaluation.show_every and config.expert_shards > 1 and jax.process_count() > 1:
        raise UserError(
            f"evaluation.show_every={config.evaluation.show_every} asks one process for the whole "
            "network, which expert_shards spreads over several: set it to 0"
        )


def _stand_in(config: ConfigDict) -> tuple[Network, Tree]:
    """The network for images that are not known yet, and the shapes of its parameters."""
    channels = max(len(config.model.mean), len(config.model.std), 1)
    network, params, _ = build.network_shapes(config, channels, _CLASSES)
    return network, params


def check_start(config: ConfigDict) -> None:
    """Raises UserError if what training is to start from is not there, not named, or of no use."""
    if config.start.equal_experts and config.start.run:
        raise UserError(
            "start.equal_experts=True would make the experts of start.run one: set one of the two"
        )
    start = methods.method(config.method).start
    needed = [config.start.run] if config.start.run else []
    if start is not None:
        if not config_lib.value(config, start.run):
            raise UserError(start.missing)
        needed.append(config_lib.value(config, start.run))
    for run in needed:
        directory.read_config(storage.path_of(run))


def _check_memory(config: ConfigDict, params: Tree) -> None:
    leaves = jax.tree.leaves(params)
    weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    copies = 3 + (config.ema_decay > 0)  # gradients and momentum beside them
    check_fits(
        f"{config.model.name} with {sum(math.prod(x.shape) for x in leaves):,} parameters, their "
        "gradients and the optimizers' state",
        copies * weights,
        "make the network smaller (model.width, model.num_experts, model.router)",
    )
