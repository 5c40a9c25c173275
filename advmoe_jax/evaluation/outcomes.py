"""What is kept of an evaluation image by image: who fell, to what, and the images themselves."""

from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.files import write_npz

OUTCOMES, EXAMPLES = "outcomes", "examples"


def write_outcome(
    workdir: Path,
    name: str,
    outcome: Outcome,
    indices: np.ndarray,
    labels: np.ndarray,
    params_sha256: str,
    fooled_by: np.ndarray | None = None,
) -> Path:
    """Writes ``outcomes/<name>.npz``.

    Arrays of n images: ``indices`` int64 (of the test split), ``labels`` and ``predictions``
    int32 (-1: logits are no numbers), ``correct`` bool, ``choices`` (an MoE's experts), ``exits``
    int32 (the exit, from 0, at which a multi-exit network was left) and ``exit_correct`` bool
    [n, exits], ``fooled_by`` str (the attack of an ensemble that succeeded; ``clean``: none was
    needed; empty: none did); and ``params_sha256``.
    """
    arrays = {
        "indices": indices,
        "labels": labels,
        "predictions": outcome.predictions,
        "correct": outcome.correct,
        "choices": outcome.choices,
        "exits": outcome.exits,
        "exit_correct": outcome.exit_correct,
        # As wide as the longest name, not as AutoAttack's record.
        "fooled_by": None if fooled_by is None else np.array(fooled_by.tolist()),
        "params_sha256": np.array(params_sha256),
    }
    path = workdir / OUTCOMES / f"{name}.npz"
    return write_npz(path, {k: v for k, v in arrays.items() if v is not None})


def write_examples(
    workdir: Path,
    name: str,
    attack: NamedAttack,
    outcome: Outcome,
    indices: np.ndarray,
    labels: np.ndarray,
) -> Path:
    """Writes ``examples/<name>.npz``, for another tool to check.

    ``images`` float32 [n, H, W, C] in [0, 1], the clean image where no attack succeeded;
    ``labels`` and ``predictions`` int32 [n]; ``indices`` int64 [n] of the test split; ``attack``,
    ``norm`` str and ``epsilon`` float64.
    """
    arrays: dict[str, Any] = {
        "images": np.asarray(outcome.images, np.float32),
        "labels": labels,
        "predictions": outcome.predictions,
        "indices": indices,
        "attack": np.array(attack.name),
        "norm": np.array(attack.threat.norm),
        "epsilon": np.array(float(attack.threat.epsilon)),
    }
    path = workdir / EXAMPLES / f"{name}.npz"
    return write_npz(path, arrays)
