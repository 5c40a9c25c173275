"""Runs made of weights that were trained elsewhere."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.errors import UserError
from advmoe_jax.runs import directory
from advmoe_jax.types import Tree

_OF_A_RUN = (directory.CHECKPOINTS, directory.WEIGHTS, "metrics.jsonl", "results.json")


def free_directory(path: str) -> Path:
    """The directory of that path, which is not made yet.

    Raises:
        UserError: if it holds a run.
    """
    workdir = directory.located(path)
    if any((workdir / name).exists() for name in _OF_A_RUN):
        raise UserError(f"{workdir} holds a run already: use another --workdir")
    return workdir


def write(config: ConfigDict, workdir: Path, params: Tree, stats: Tree, step: int) -> None:
    """Makes the directory a run with these weights, which ``evaluate`` can read.

    Args:
        config: of the run.
        workdir: its directory.
        params: parameters.
        stats: statistics.
        step: how many steps or epochs were made, as far as is known.

    Raises:
        UserError: if the directory cannot be made.
    """
    workdir = directory.create(str(workdir))
    directory.claim(workdir, config)
    state = {"params": params, "stats": stats, "step": np.int32(step)}
    with directory.open_checkpoints(config, workdir) as checkpointer:
        # What the file says of its accuracy is of another split: 0 ranks it below all that is
        # measured here.
        checkpointer.save(step, {"state": state}, 0.0)
