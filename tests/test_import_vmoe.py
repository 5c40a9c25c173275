"""``import_vmoe`` from the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from advmoe_jax.runs import directory

REPOSITORY = Path(__file__).parents[1]
CHECKPOINT = REPOSITORY / "tests" / "published" / "data" / "vmoe"


def command(*arguments, code=0):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "advmoe_jax.import_vmoe", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout if code == 0 else process.stderr


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run(tmp_path):
    asked = ("--config=configs/vmoe_digits.py", f"--checkpoint={CHECKPOINT}")
    said = command(*asked, f"--workdir={tmp_path / 'run'}", "--image_size=12")
    assert "with 3 experts, 4 classes, images of 12x12: imported into" in said
    config = directory.read_config(tmp_path / "run")
    assert config.model.placement == "1,2" and config.data.image_size == 12
    with directory.open_checkpoints(config, tmp_path / "run") as checkpointer:
        step, saved = checkpointer.restore_best(None)
    assert step == 0
    with np.load(CHECKPOINT.with_suffix(".npz")) as file:
        kernel = saved["state/params/experts/block1/mlp/dense1/kernel"]
        expected = file["params/Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"]
        np.testing.assert_array_equal(kernel, expected)
    again = command(*asked, f"--workdir={tmp_path / 'run'}", code=2)
    assert "holds a run already" in again


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ((f"--checkpoint={CHECKPOINT}x",), "error: .*vmoex.index does not exist"),
        ((f"--checkpoint={CHECKPOINT}", "--image_size=10"), "error: model.patch=4 does not divide"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path, changes, text):
    said = command("--config=configs/vmoe_digits.py", f"--workdir={tmp_path / 'run'}", *changes,
                   code=2)  # fmt: skip
    assert len(said.strip().splitlines()) == 1
    assert re.search(text, said)
