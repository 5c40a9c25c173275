"""Training from a notebook: what ``python -m advmoe_jax.train`` does, as one call."""

from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.leaving import check_rule
from advmoe_jax.runs.loading import load
from advmoe_jax.runs.lock import locked
from advmoe_jax.runs.rehearsal import check_start, rehearse
from advmoe_jax.runs.trained import Run
from advmoe_jax.runs.training import complete


def fit(config: ConfigDict, workdir: str | Path, *, quiet: bool = True) -> Run:
    """Trains a config's network to the end, evaluates it, and returns the run.

    The same call again, after an interruption too, goes on where it was; a run that has ended is
    only loaded and evaluated.

    Args:
        config: of the run, from ``defaults``; it is not changed.
        workdir: the run's directory; made if missing.
        quiet: whether nothing is printed.

    Raises:
        UserError: if the config cannot be trained, or the directory is another run's.
        training.loop.Stopped: on SIGTERM or SIGINT, after saving.
    """
    config_lib.check(config)
    config = build.settled(config, typed=False)
    check_rule(config)
    rehearse(config)
    check_start(config)
    place = directory.create(str(workdir))
    with locked(place, "training"):
        directory.claim(place, config)
        complete(config, place, build.load_images(config), Console(quiet=quiet))
    return load(place)
