"""Trained runs by the words of a notebook: a directory, a file, a name in the package's zoo."""

from pathlib import Path

import numpy as np

from advmoe_jax import storage
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.runs import build, directory, saved
from advmoe_jax.runs.trained import Run

ZOO = Path(__file__).parents[1] / "zoo"
_PREFIX = "zoo:"


def load(where: str | Path, which: str = "best") -> Run:
    """A trained run, for a notebook; its data set need not be there.

    Args:
        where: the directory of a run, a file that ``Run.save`` wrote, or the name of a network that
            comes with the package, such as ``zoo:digits-advmoe``.
        which: of a directory's checkpoints, ``best`` by the validation split, or ``last``.

    Raises:
        UserError: if there is no intact run.
    """
    if which not in ("best", "last"):
        raise UserError(f"which={which!r} is no checkpoint: choose 'best' or 'last'")
    if str(where).startswith(_PREFIX):
        name = str(where).removeprefix(_PREFIX)
        names = sorted(path.stem for path in ZOO.glob("*.npz"))
        if name not in names:
            listed = ", ".join(_PREFIX + x for x in names)
            raise UserError(f"{where} is not in the zoo; choose from {listed}")
        return _of_file(str(where), ZOO / f"{name}.npz")
    path = storage.path_of(where)
    return _of_file(str(where), path) if path.is_file() else _of_directory(path, which)


def _of_file(where: str, path: Path) -> Run:
    network, found = saved.read(path)
    return Run(
        where,
        found.config,
        found.kind,
        network,
        found.params,
        found.stats,
        found.results,
        found.sample,
    )


def _of_directory(workdir: Path, which: str) -> Run:
    config = directory.read_config(workdir)
    # Runs of weights that were trained elsewhere say nothing of their images.
    kind = directory.read_kind(workdir) or build.load_images(config).kind
    network, params, stats = directory.restore_network(config, workdir, kind, which)
    results = read_results(workdir)
    weights = directory.Weights(0, params, stats)
    if (results or {}).get("evaluated", {}).get("params_sha256") != weights.sha256:
        results = None
    if results and "exits" in results:
        stats = with_thresholds(stats, np.array(results["exits"]["thresholds"]))
    return Run(str(workdir), config, kind, network, params, stats, results)
