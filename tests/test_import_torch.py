"""A run goes out as a published checkpoint, comes in again, and evaluates to the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

REPOSITORY = Path(__file__).parents[1]
SMALL = {
    "model.width": 4,
    "model.router.width": 4,
    "model.router.blocks": 1,
    "data.train_examples": 128,
    "num_epochs": 1,
    "attack.num_steps": 1,
    "evaluation.attacks": "pgd2",
    "evaluation.validation_steps": 1,
}


def command(module, *arguments, code=0):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"advmoe_jax.{module}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout if code == 0 else process.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A trained run, and the file it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    values = [f"--config.{name}={value}" for name, value in SMALL.items()]
    command("train", "--config=configs/digits.py", f"--workdir={folder / 'run'}", *values)
    path = folder / "run.pth.tar"
    command("export_torch", f"--workdir={folder / 'run'}", f"--checkpoint={path}", "--which=last")
    return folder / "run", path


def of_network(path):
    return (
        "--config=configs/digits.py",
        f"--checkpoint={path}",
        "--model=resnet10_cifar",
        "--width=4",
    )


@pytest.mark.slow
def test_the_same_bits_evaluate_to_the_same_numbers(exported, tmp_path):
    run, path = exported
    workdir = tmp_path / "imported"
    said = command("import_torch", *of_network(path), f"--workdir={workdir}")
    assert "advmoe_jax.evaluate" in said
    for directory in (run, workdir):
        asked = "--attacks=pgd2", "--checkpoint=last", f"--out={tmp_path / directory.name}-found"
        command("evaluate", f"--workdir={directory}", *asked)
    ours, theirs = (
        json.loads((tmp_path / f"{d.name}-found" / "results.json").read_text())
        for d in (run, workdir)
    )
    for name in ("params_sha256", "standard_accuracy", "robust_accuracy", "routing", "cost"):
        assert ours[name] == theirs[name], name
    again = tmp_path / "again.pth.tar"
    command("export_torch", f"--workdir={workdir}", f"--checkpoint={again}")
    command("import_torch", *of_network(again), f"--workdir={tmp_path / 'twice'}")


@pytest.mark.slow
def test_mistakes_get_one_line(exported, tmp_path):
    run, path = exported
    for arguments, said in (
        ((*of_network(path), f"--workdir={run}"), "holds a run already"),
        ((*of_network(path), f"--workdir={tmp_path / 'x'}", "--ratio=1"), "does not fit"),
        ((*of_network(tmp_path / "none"), f"--workdir={tmp_path / 'x'}"), "cannot be read"),
        ((*of_network(path)[:2], f"--workdir={tmp_path / 'x'}"), "--model is missing"),
    ):
        (line,) = command("import_torch", *arguments, code=2).splitlines()
        assert line.startswith("error: ") and said in line
        assert not (tmp_path / "x" / "checkpoints").exists()
