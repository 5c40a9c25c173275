"""One run in its directory, from config to report: the only room that reads a config.

The verbs are in modules of their own, which the commands import: ``training.complete``,
``evaluating.evaluate``, ``explaining.explain``, ``comparing.compare``.
"""

from advmoe_jax.runs.build import Images, create_network, load_images
from advmoe_jax.runs.directory import claim, create, read_config, restore, restore_network
from advmoe_jax.runs.loading import load
from advmoe_jax.runs.notebook import fit
from advmoe_jax.runs.recipe import optimizers_and_step
from advmoe_jax.runs.trained import Attacked, Run

__all__ = [
    "Attacked",
    "Images",
    "Run",
    "claim",
    "create",
    "create_network",
    "fit",
    "load",
    "load_images",
    "optimizers_and_step",
    "read_config",
    "restore",
    "restore_network",
]
