"""bfloat16 trains as well as float32: ``python -m studies.precision``.

AdvMoE on the digits, several seeds, each run in a process of its own. Validation accuracies of both
types must lie within two points of each other. One run's robust accuracy is noisier than that: six
seeds of float32 differ by 4.5 points (standard deviation) on the 360 test images. So accuracies are
those of validation images, averaged over the second half of training and over seeds; that leaves a
standard error of about 0.3 points of SA and 1.5 of RA, which RA is allowed beside the two.

Takes about ten minutes on two CPU cores (an estimate), two runs at a time.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import flags
from jaxtyping import Float

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.metrics import METRICS, read_metrics
from studies.bars import Bar, conclude

SEEDS = flags.DEFINE_integer("seeds", 4, "runs of each type, at least two", allow_override=True)
EPOCHS = flags.DEFINE_integer("epochs", 16, "of every run, at least two", allow_override=True)
ROOT = Path(__file__).parents[1]
SINGLE, HALF = "float32", "bfloat16"
VALUES = {
    "model.width": 8,
    "model.router.width": 4,
    "data.validation_fraction": 0.3,
    "evaluation.attacks": "clean",
}


def main() -> None:
    """Trains every seed in both types, and compares."""
    for flag in (SEEDS, EPOCHS):
        if flag.value < 2:
            raise UserError(f"--{flag.name}={flag.value} must be at least 2")
    found: dict[str, list[np.ndarray]] = {SINGLE: [], HALF: []}
    with TemporaryDirectory() as root, ThreadPoolExecutor(2) as pool:
        for seed in range(SEEDS.value):  # the second finds the programs of the first
            runs = [pool.submit(train, dtype, seed, Path(root)) for dtype in found]
            for accuracies, run in zip(found.values(), runs, strict=True):
                accuracies.append(run.result())
    conclude("bfloat16 beside float32", list(bars(*map(np.array, found.values()))))


def bars(
    single: Float[np.ndarray, "seeds epochs 2"], half: Float[np.ndarray, "seeds epochs 2"]
) -> Iterator[Bar]:
    """What must hold of the validation accuracies (SA, RA) of both types, in percent."""
    by_seed = 100 * (half - single).mean(axis=1)
    noise = by_seed.std(axis=0, ddof=1) / np.sqrt(len(by_seed))
    apart = np.abs(by_seed.mean(axis=0))
    means = zip(*(100 * x.mean(axis=(0, 1)) for x in (single, half)), strict=True)
    for name, (of_single, of_half), points, error in zip(
        ("SA", "RA"), means, apart, noise, strict=True
    ):
        about = f"{name} {of_single:.1f}% in {SINGLE}, {of_half:.1f}% in {HALF}: points apart"
        about += f" (standard error {error:.1f})"
        yield Bar(about, points, 2.0 + (error if name == "RA" else 0.0))
    # So that there is something to lose.
    yield Bar(f"RA in {SINGLE}, %", 100 * single.mean(axis=(0, 1))[1], 40.0, True)
    differing = float(np.mean(single != half))
    yield Bar("share of accuracies that differ at all, %", 100 * differing, 1.0, True)


def train(dtype: str, seed: int, root: Path) -> Float[np.ndarray, "epochs 2"]:
    """(SA, RA) on the validation images, in the epochs of the second half.

    Raises:
        UserError: if the run fails.
    """
    workdir = root / f"{dtype}{seed}"
    values = VALUES | {"num_epochs": EPOCHS.value, "model.dtype": dtype, "seed": seed}
    command = [sys.executable, "-m", "advmoe_jax.train", "--config=configs/digits.py"]
    command += [f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in values.items())]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"the run in {dtype} with seed {seed} failed: {done.stderr.strip()}")
    epochs = read_metrics(workdir / METRICS)[EPOCHS.value // 2 :]
    names = "standard_accuracy", "robust_accuracy"
    return np.array([[epoch["validation"][name] for name in names] for epoch in epochs])


if __name__ == "__main__":
    cli.run(main, needs=())
