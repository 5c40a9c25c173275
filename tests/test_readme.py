"""The front page: short, and what it says is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_jax.evaluation.named_attacks import ATTACKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MOST_LINES = 150


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_three_systems_have_a_command_each():
    table = re.findall(r"^\| .*?-m advmoe_jax\.train --config=(configs/\w+\.py)", README, re.M)
    assert table == ["configs/digits.py", "configs/rdi_digits.py", "configs/vmoe_digits.py"]


def test_every_guide_is_named():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in README, page.name


def test_shell_blocks_are_of_commands_that_are_there():
    """``make``, what installs, and the package's commands, which ``test_docs`` parses."""
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            assert re.match(
                r"make (run|test) |python3 -m venv|source \.venv/bin/activate$|pip install -e "
                r"|python -m advmoe_jax",
                line,
            ), line


def test_what_make_run_prints_is_laid_out_as_it_is(capsys):
    from rich.console import Console

    from advmoe_jax.reports.table import results_table

    attacks = {"fgsm": (0.8306, 1, 0.2), "pgd20": (0.7444, 20, 0.02), "router": (0.8028, 20, 0.02)}
    speeds = {"clean": 14085, "fgsm": 6215, "pgd20": 541, "router": 1216}
    agreement = {"fgsm": 0.953, "pgd20": 0.958, "router": 0.786}
    ball = {"norm": "linf", "epsilon": 0.2, "restarts": 1}
    results = {
        "method": "advmoe",
        "model": "resnet10_cifar",
        "dataset": "digits",
        "standard_accuracy": 0.9917,
        "robust_accuracy": {name: accuracy for name, (accuracy, _, _) in attacks.items()},
        "attacks": {"clean": {"examples": 360}}
        | {
            name: ball | {"num_steps": steps, "step_size": size}
            for name, (_, steps, size) in attacks.items()
        },
        "routing": {"agreement": agreement},
        "images_per_second": speeds,
    }
    Console(width=80).print(results_table(results))
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    (shown,) = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)
    assert shown.splitlines() == printed


@pytest.mark.slow
def test_the_three_lines_of_a_notebook(fork, tmp_path, monkeypatch):
    """On a small run, and with a fast attack in the place of the named one."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (attack,) = re.findall(r'attack\("(\w+)"', code)
    assert attack in ATTACKS
    values = {"model.width": 4, "model.router.width": 4, "num_epochs": 1, "attack.num_steps": 1}
    values |= {"data.train_examples": 256, "evaluation.attacks": "pgd2"}
    overrides = [f"--config.{name}={value}" for name, value in values.items()]
    workdir = f"--workdir={tmp_path / 'runs' / 'digits'}"
    done = fork("advmoe_jax.train", "--config=configs/digits.py", workdir, *overrides)
    assert done[0] == 0, done
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.replace(attack, "pgd2"), "README.md", "exec"), names)
    assert names["result"].name == "pgd2"
    assert len(names["result"].robust) == len(names["run"].images.test.labels) == 360


def test_the_package_is_loaded_room_by_room():
    code = "import sys, advmoe_jax; assert 'jax' not in sys.modules; print(advmoe_jax.models.CNN())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("CNN(name='resnet18_cifar'"), done.stderr
