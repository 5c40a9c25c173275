"""A run made small enough to travel: weights in half the bits, with the numbers that these have."""

from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.runs import build, directory, importing
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.evaluating import Asked, evaluate
from advmoe_jax.runs.trained import Run
from advmoe_jax.types import Tree

# Of the results of the whole run, what says how it was trained.
_OF_TRAINING = ("steps", "params_sha256", "device", "versions", "git_commit")


def export(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    path: Path,
    console: Console,
    *,
    attacks: str,
    examples: int = 0,
    sample: int = 100,
    half: bool = True,
) -> Run:
    """Writes the best checkpoint of a run as one file, which ``load`` reads.

    What is written is evaluated, and not what it was rounded from: on ``examples`` test images and
    on the sample, whose numbers stand under ``<attack>@<sample>`` as in every ``results.json``.
    ``results["trained"]`` says how the run itself was trained.

    Args:
        config: of the run.
        workdir: its directory.
        images: of the run.
        path: of the file.
        console: where people read.
        attacks: comma-separated, see ``evaluation.named_attacks``.
        examples: number of test images to evaluate on; 0: all.
        sample: number of test images that are written to the file.
        half: whether to round the weights to float16.

    Raises:
        UserError: if there is no checkpoint, or an attack cannot be made.
    """
    network, params, stats = directory.restore_network(config, workdir, images)
    if half:
        params, stats = _rounded(params), _rounded(stats)
    trained = read_results(workdir) or {}
    config = config_lib.with_changes(config, {"ema_decay": 0.0})  # there is one set of weights
    with TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        importing.write(config, place, params, stats, int(trained.get("steps", 0)))
        for count in (examples, sample):
            evaluate(config, place, images, Asked(attacks, count), console)
        results = read_results(place)
    results["trained"] = {name: trained.get(name) for name in _OF_TRAINING}
    if "exits" in results:
        stats = with_thresholds(stats, np.array(results["exits"]["thresholds"]))
    chosen = Split(*map(np.asarray, build.subset(images.test, sample)))
    run = Run(str(path), config, images.kind, network, params, stats, results, chosen)
    run.save(path)
    return run


def _rounded(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype("float16").astype(x.dtype), tree)
