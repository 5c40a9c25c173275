"""A command that is killed at any moment goes on to the same bits: ``python -m studies.kills``.

Training, evaluation, comparison and explanation of small networks on the digits are killed at
random moments, by SIGKILL and by SIGINT (Ctrl-C), again and again in one directory; then the same
command is given once more and left alone. What it ends with must be what a command ends with that
nobody disturbed: the parameters, bit for bit, every accuracy, every outcome. After each kill, no
file that has its own name may be half written. After SIGINT the exit code must be 130 (0, if the
command had ended already), and no traceback be shown.

Takes about a quarter of an hour on two CPU cores: ``--kills`` and ``--interrupts`` say how often.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from advmoe_jax import cli
from studies.bars import Bar, conclude

KILLS = flags.DEFINE_integer("kills", 50, "by SIGKILL, over all commands")
INTERRUPTS = flags.DEFINE_integer("interrupts", 20, "by SIGINT, over all commands")
SEED = flags.DEFINE_integer("seed", 0, "of the moments", allow_override=True)
_IN_A_ROW = 4  # in one directory, before the command may end

_SMALL = {
    "num_epochs": 4,
    "batch_size": 64,
    "data.train_examples": 512,
    "model.width": 4,
    "model.router.width": 4,
    "attack.num_steps": 1,
    "evaluation.batch_size": 60,
    "evaluation.validation_steps": 1,
}
# What is told of a process and its speed, and not of what it found.
_OF_THE_PROCESS = re.compile(
    r"seconds|images_per_second|throughput|command|dense_run|start|report|git_commit|warnings"
)


class Command(NamedTuple):
    """A command that is killed.

    Attributes:
        module: of the package.
        arguments: besides the directory.
        prepared: the commands that make what it starts from.
    """

    module: str
    arguments: tuple[str, ...]
    prepared: tuple["Command", ...] = ()


def _config(file: str, prefix: str, **more: Any) -> tuple[str, ...]:
    values = {f"{prefix}{name}": value for name, value in _SMALL.items()} | more
    return (f"--config=configs/{file}.py", *(f"--config.{k}={v}" for k, v in values.items()))


_TRAIN = Command("train", _config("digits", "", **{"evaluation.attacks": "fgsm,pgd2"}))
COMMANDS = (
    _TRAIN,
    Command("evaluate", ("--attacks=pgd20,square,pgd5", "--examples=240"), (_TRAIN,)),
    Command("explain", ("--attack=pgd10", "--examples=120"), (_TRAIN,)),
    Command(
        "compare",
        _config(
            "compare_digits",
            "run.",
            rows="at_dense,advmoe_assignment",
            num_seeds=1,
            attacks="pgd2",
            strong_attacks="square",
            explained_attack="pgd2",
            explained_examples=30,
        ),
    ),
)


def main() -> None:
    """Kills, resumes, compares; ends with code 1 if anything was lost."""
    rng, unlike, torn, wrong = random.Random(SEED.value), [], [], []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for number, command in enumerate(COMMANDS):
            began = root / f"{number}-prepared"
            for needed in command.prepared:
                _finish(needed, began)
            whole = _copy(began, root / f"{number}-whole")
            started = time.perf_counter()
            _finish(command, whole)
            _finish(command, _copy(began, root / f"{number}-timed"))  # with everything compiled
            seconds = (time.perf_counter() - started) / 2
            expected = found(whole)
            for by, count in ((signal.SIGKILL, KILLS.value), (signal.SIGINT, INTERRUPTS.value)):
                moments = _share(count, number)
                for chain in range(0, moments, _IN_A_ROW):
                    workdir = _copy(began, root / f"{number}-{by.name}-{chain}")
                    for _ in range(min(_IN_A_ROW, moments - chain)):
                        wrong += _kill(command, workdir, by, rng.uniform(0, seconds))
                        torn += half_written(workdir)
                    _finish(command, workdir)
                    if differing := sorted(_differences(expected, found(workdir))):
                        unlike.append((command.module, by.name, differing[:3]))
                print(f"{command.module}: {moments} times {by.name}", flush=True)
    for what in (*unlike, *torn, *wrong):
        print(what)
    conclude(
        f"{KILLS.value} kills and {INTERRUPTS.value} interrupts of {len(COMMANDS)} commands",
        [
            Bar("directories that ended unlike an undisturbed one", len(unlike), 0),
            Bar("files half written", len(torn), 0),
            Bar("interrupted commands without code 130 and one line", len(wrong), 0),
        ],
    )


def _share(count: int, number: int) -> int:
    """How many of ``count`` kills a command gets."""
    return len(range(number, count, len(COMMANDS)))


def _copy(source: Path, target: Path) -> Path:
    if source.exists():
        shutil.copytree(source, target)
    return target


def _start(command: Command, workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", f"advmoe_jax.{command.module}", f"--workdir={workdir}"),
            *command.arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(command: Command, workdir: Path) -> None:
    process = _start(command, workdir)
    _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command.module} in {workdir} ended with {process.returncode}: {said}")


def _kill(command: Command, workdir: Path, by: signal.Signals, after: float) -> list[str]:
    """Starts the command and kills it; what was wrong with its end, if it was interrupted."""
    process = _start(command, workdir)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(by)
    _, said = process.communicate()
    # Before the command is at work, Python itself may answer.
    is_early = "KeyboardInterrupt" in said and "advmoe_jax/cli.py" not in said
    if by == signal.SIGKILL or process.returncode == 0 or is_early:
        return []
    lines = [line for line in said.splitlines() if line]
    if process.returncode == 128 + by and len(lines) == 1:
        return []
    return [f"{command.module} after {after:.1f} s: {process.returncode} {lines[-3:]}"]


def half_written(workdir: Path) -> list[str]:
    """The files of a directory, but for unfinished ones by their name, that cannot be read."""
    torn = []
    for path in sorted(workdir.rglob("*")):
        unfinished = path.name.endswith(".partial") or "orbax-checkpoint-tmp" in str(path)
        if unfinished or path.suffix not in (".json", ".npz") or not path.is_file():
            continue
        try:
            json.loads(path.read_text()) if path.suffix == ".json" else _arrays(path)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            torn.append(f"{path}: {error}")
    return torn


def found(workdir: Path) -> dict[str, str]:
    """All that a directory's files say of what was found, by their names and dotted names."""
    said = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name in ("results.json", "explanation.json"):
            for inside, value in _flat(json.loads(path.read_text())):
                if not _OF_THE_PROCESS.search(inside):
                    said[f"{name}:{inside}"] = repr(value)
        elif path.suffix == ".npz" and "unfinished" not in name:
            for inside, array in _arrays(path).items():
                said[f"{name}:{inside}"] = f"{array.dtype}{array.shape}{array.tobytes().hex()}"
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for number, line in enumerate(lines):
                said |= {
                    f"{name}:{number}.{inside}": repr(value)
                    for inside, value in _flat(line)
                    if not _OF_THE_PROCESS.search(inside)
                }
    return said


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in items:
        if isinstance(value, dict | list):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _differences(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


if __name__ == "__main__":
    cli.run(main, needs=())
