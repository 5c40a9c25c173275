"""Whatever a config's values and a run's files are: a command works, or says why in one line.

Each try has some seconds of its own, in which a refusal has to come; nothing outside of the run's
directory is touched. Every value that is accepted would be trained with: of those, a few are.
"""

import json
import os
import random
import shutil
import zlib
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from advmoe_jax import config as config_lib
from advmoe_jax import defaults

pytestmark = pytest.mark.slow
# Of the files an eighth is tried here: each is a process that evaluates. FUZZ_TRIES=200 tries more.
TRIES = int(os.environ.get("FUZZ_TRIES", 200))
FILE_TRIES = int(os.environ.get("FUZZ_TRIES", 25))
SECONDS = 20  # on two busy cores; a refusal takes two
CONFIG = "--config=configs/digits.py"
SMALL = {
    "model.name": "resnet4_cifar",
    "model.width": 4,
    "model.router.width": 4,
    "model.router.blocks": 1,
    "data.train_examples": 128,
    "batch_size": 32,
    "num_epochs": 1,
    "attack.num_steps": 1,
    "evaluation.attacks": "fgsm",
    "evaluation.validation_steps": 1,
}
TYPES = {
    name: config_lib.type_of(name, config_lib.schema_of(defaults.cnn()))
    for name in config_lib.names(config_lib.schema_of(defaults.cnn()))
}
# Deterministic, and every example is a process: to shrink a failure would take minutes.
fuzzed = partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

INTEGERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63, 10**30, -(2**63)])
)
FLOATS = st.one_of(
    st.floats(-2, 2),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "1e-320", 1e38, -1e38, "8/255", "1/0", 0.0]),
)
TEXTS = st.one_of(
    st.sampled_from(["", " ", ",", "linf", "l2", "none", "cosine", "advmoe", "trades", "standard"]),
    st.sampled_from(["adam", "every", "blocks", "router", "clean", "pgd0", "pgd5", "moe", "/"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
)
TUPLES = st.sampled_from(
    ["()", "(0.5,)", "(0.0,)", "(1, 2, 3)", "('a',)", "((1,),)", "5", "(1e999,)"]
)
VALUES = {bool: st.sampled_from(["true", "false", "2", ""]), int: INTEGERS, float: FLOATS}
VALUES |= {str: TEXTS, tuple: TUPLES}


@st.composite
def overrides(draw):
    """One to three values of the config, mostly of their own type."""
    names = draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=3, unique=True))
    kinds = [draw(st.sampled_from([TYPES[name]] * 5 + list(VALUES))) for name in names]
    return {name: draw(VALUES[kind]) for name, kind in zip(names, kinds, strict=True)}


def is_one_line(code, err):
    return code == 2 and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1


def contents(directory):
    """Every file below a directory, with its content."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def arguments_of(values):
    return [f"--config.{name}={value}" for name, value in (SMALL | values).items()]


@fuzzed(max_examples=TRIES)
@given(overrides())
def test_values_of_a_config(fork, tmp_path_factory, values):
    said = fork("advmoe_jax.train", CONFIG, "--show", *arguments_of(values), seconds=SECONDS)
    code, out, err = said
    assert (code == 0 and "steps" in out and not err) or is_one_line(code, err), (values, said)
    # Of those that are accepted, every tenth or so is trained with; but for lengths.
    if code == 0 and zlib.crc32(repr(values).encode()) % 10 == 0:
        values = {name: x for name, x in values.items() if "num_" not in name}
        workdir = f"--workdir={tmp_path_factory.mktemp('accepted') / 'run'}"
        code, _, err = fork(
            "advmoe_jax.train", CONFIG, workdir, *arguments_of(values), seconds=2 * SECONDS
        )
        # None: there is more to do than there is time for, such as 2**31 restarts.
        assert code in (0, None) or is_one_line(code, err), (values, err)


# ----------------------------------------------------------------------------- a run's files


@pytest.fixture(scope="module")
def run(fork, tmp_path_factory):
    """A run that was trained, evaluated and explained."""
    workdir = tmp_path_factory.mktemp("fuzz") / "run"
    steps = [
        ("train", [CONFIG, *arguments_of({"evaluation.attacks": "fgsm"})]),
        ("explain", ["--attack=fgsm", "--examples=32"]),
    ]
    for command, arguments in steps:
        code, _, err = fork(f"advmoe_jax.{command}", f"--workdir={workdir}", *arguments)
        assert (code, err) == (0, "")
    return workdir


def damaged(content, seed):
    """Other bytes: some changed, cut off, put in, or all replaced; JSON with other values, too."""
    rng = random.Random(seed)
    how = rng.choice(["flip", "cut", "insert", "empty", "noise", "json", "json", "deep"])
    if how == "flip":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how == "cut":
        return content[: rng.randrange(len(content) + 1)]
    if how == "insert":
        at = rng.randrange(len(content) + 1)
        return content[:at] + rng.randbytes(rng.randint(1, 50)) + content[at:]
    if how == "empty":
        return b""
    if how == "noise":
        return rng.randbytes(rng.randint(1, 2000))
    if how == "deep":
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000
    try:
        return json.dumps(with_other_value(json.loads(content), rng)).encode()
    except ValueError:
        return content[::-1]


def with_other_value(tree, rng):
    """The tree with one value somewhere in it replaced by one of another kind, or left out."""
    others = [None, True, -1, 2**70, 1e300, float("nan"), "text", [], {}, [[1]], {"a": {"b": 1}}]
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return rng.choice(others)
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        return [*tree[:at], with_other_value(tree[at], rng), *tree[at + 1 :]]
    name = rng.choice(sorted(tree))
    if rng.random() < 0.2:
        return {other: value for other, value in tree.items() if other != name}
    return tree | {name: with_other_value(tree[name], rng)}


COMMANDS = {
    "evaluate": ["--attacks=clean", "--examples=16"],
    "explain": ["--attack=fgsm", "--examples=16"],
    "train": [CONFIG, *arguments_of({"evaluation.attacks": "fgsm"})],
}


@fuzzed(max_examples=FILE_TRIES)
@given(st.integers(0, 2**30))
def test_bytes_of_the_files_of_a_run(fork, run, tmp_path_factory, seed):
    rng = random.Random(seed)
    place = Path(tmp_path_factory.mktemp("fuzzed"))
    workdir, beside = place / "run", place / "beside"
    shutil.copytree(run, workdir)
    beside.write_text("not the run's")
    files = [x for x in sorted(workdir.rglob("*")) if x.is_file() and "tensorboard" not in str(x)]
    path = rng.choice(files)
    path.write_bytes(damaged(path.read_bytes(), seed))
    command = rng.choice(["evaluate"] * 8 + ["explain", "train"])  # the latter take longer
    said = fork(f"advmoe_jax.{command}", f"--workdir={workdir}", *COMMANDS[command])
    told = (command, path.relative_to(workdir), said)
    code, _, err = said
    lines = err.splitlines()
    works = code == 0 and all(line.startswith("warning: ") for line in lines)
    warned = all(line.startswith("warning: ") for line in lines[:-1])
    assert works or (warned and is_one_line(code, "".join(lines[-1:]) + "\n")), told
    assert beside.read_text() == "not the run's"
    assert {x.name for x in place.iterdir()} <= {"run", "beside", ".jax_cache"}, told
    shutil.rmtree(place)
