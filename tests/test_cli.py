"""What is said of a user's mistakes: one line, exit code 2, no traceback, and nothing is lost.

Most commands are forks of one process; a few are started as a user would.
"""

import importlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.__main__ import COMMANDS
from advmoe_jax.evaluation.named_attacks import ATTACKS

REPOSITORY = Path(__file__).parents[1]
SMALL = {
    "model.name": "resnet4_cifar",
    "model.width": 4,
    "model.router.width": 4,
    "model.router.blocks": 1,
    "data.train_examples": 256,
    "batch_size": 64,
    "num_epochs": 1,
    "attack.num_steps": 1,
    "evaluation.attacks": "pgd2",
    "evaluation.validation_steps": 1,
}

COMPARE = ("--config=configs/compare_digits.py", "--workdir=x")


def small(**changes):
    """The arguments of a small training, with some values of the config changed."""
    values = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/digits.py", *overrides]


def error_of(code, out, err):
    """The one line of a mistake."""
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def train_error(fork, tmp_path):
    """The one line that a training ends in, which must not leave a checkpoint."""

    def run(*arguments, workdir=None, **settings):
        workdir = workdir or tmp_path / "run"
        line = error_of(*fork("advmoe_jax.train", f"--workdir={workdir}", *arguments, **settings))
        assert not (workdir / "checkpoints").exists()
        return line

    return run


@pytest.fixture
def evaluate_error(fork):
    return lambda *arguments: error_of(*fork("advmoe_jax.evaluate", *arguments))


def contents(directory):
    """Every file below a directory, and what it holds; locks say who came last."""
    files = (x for x in sorted(directory.rglob("*")) if x.is_file() and x.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("train", [], "--config is missing; see --help"),
        ("train", ["--config=configs/digits.py"], "--workdir is missing; see --help"),
        ("train", ["--config=configs/digits.py", "--workdir="], "--workdir is missing"),
        ("train", ["--config=my configs/a.py"], "--config=my configs/a.py: there is no such file"),
        ("train", ["--config=", "--workdir=x"], "--config is missing"),
        ("train", ["--config=no/such.py", "--workdir=x"], "--config=no/such.py: there is no such"),
        ("train", ["--config=configs", "--workdir=x"], "--config=configs: there is no such file"),
        (
            "train",
            [*small(), "--workdr=x"],
            "Unknown command line flag 'workdr'. Did you mean: wor",
        ),
        (
            "train",
            [*small(), "--workdir=x", "more"],
            "unexpected argument 'more'; flags are written",
        ),
        (
            "train",
            [*small(), "--process_id=x", "--workdir=x"],
            "flag --process_id=x: invalid liter",
        ),
        ("train", [*small(), "--process_id=0", "--workdir=x"], "it needs --coordinator=address"),
        ("train", [*small(), "--num_processes=2", "--workdir=x"], "--num_processes=2 is of a run"),
        (
            "train",
            [*small(), "--coordinator=host", "--workdir=x"],
            "--coordinator=host must be address:port, or auto",
        ),
        (
            "train",
            [*small(), "--coordinator=host:1", "--workdir=x"],
            "needs --num_processes and --process_id too",
        ),
        (
            "train",
            [*small(), "--coordinator=h:1", "--num_processes=2", "--process_id=2", "--workdir=x"],
            "--process_id=2 must lie in 0 to 1",
        ),
        ("evaluate", [], "--workdir is missing; see --help"),
        ("evaluate", ["--workdir="], "--workdir is missing; see --help"),
        ("evaluate", ["--workdir=x", "--examples=many"], "flag --examples=many: invalid literal"),
        ("evaluate", ["--workdir=x", "--examples=-1"], "--examples=-1 must not be negative"),
        ("evaluate", ["--workdir=x", "--checkpoint=first"], "should be one of <best|last>"),
        ("evaluate", ["--workdir=x", "more"], "unexpected argument 'more'"),
        ("evaluate", ["--workdir=no/such/run"], "no/such/run holds no run"),
        ("evaluate", ["--workdir=setup.py"], "setup.py holds no run"),
        ("explain", ["--workdir=no/such/run"], "no/such/run holds no run"),
        ("compare", [*COMPARE, "--config.explained_attack=clean"], "'clean' cannot be explained"),
        ("compare", [*COMPARE, "--config.explained_attack=square"], "'square' cannot be explained"),
        ("compare", ["--workdir=x"], "--config is missing; see --help"),
        ("compare", [*COMPARE, "--config.run.sed=1"], "did you mean config.run.seed?"),
        ("compare", [*COMPARE, "--config.run.method=foo"], "method='foo' is unknown"),
        ("compare", [*COMPARE, "--config.sparse_keep=2"], "sparse_keep=2.0 must lie in [0, 1]"),
        ("cost", ["--model=resnet18_cifar", "--target=0"], "--target=0.0 must lie in (0, 1)"),
        ("compare", [*COMPARE, "--config.seed=1"], "did you mean config.run.seed?"),
        ("compare", [*COMPARE, "--config.rows=at_dens"], "row 'at_dens' is unknown"),
        (
            "compare",
            ["--config=configs/digits.py", "--workdir=x"],
            "has no group 'run': start from",
        ),
    ],
)
def test_a_wrong_command_line(fork, module, arguments, said):
    assert said in error_of(*fork(f"advmoe_jax.{module}", *arguments))
    assert not (REPOSITORY / "x").exists()


# A command's flags as a person meets them: what must be given first, what is rarely needed last.
FIRST_FLAGS = {
    "prepare": ["dataset", "source", "data_dir"],
    "train": ["config", "workdir", "show"],
    "evaluate": ["workdir", "attacks", "examples"],
    "explain": ["workdir", "attack", "examples"],
    "compare": ["config", "workdir"],
    "leaderboard": ["out"],
    "cost": ["model", "num_experts", "ratio"],
    "export_run": ["workdir", "file"],
    "import_torch": ["checkpoint", "model"],
    "import_vmoe": ["checkpoint", "top_k"],
    "export_torch": ["workdir", "checkpoint"],
}


def test_every_main_is_a_command_and_has_its_help_tested():
    mains = [
        x.stem for x in (REPOSITORY / "advmoe_jax").glob("*.py") if "cli.run(" in x.read_text()
    ]
    assert set(mains) == set(COMMANDS) == FIRST_FLAGS.keys()


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_a_screen_with_examples_first(fork, module):
    code, out, err = fork(f"advmoe_jax.{module}", "--help")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 90
    assert lines[2] == "Examples:" and lines[3].startswith(f"    python -m advmoe_jax.{module} ")
    flags = re.findall(r"^  --(\w+)", out, flags=re.MULTILINE)
    assert flags[: len(FIRST_FLAGS[module])] == FIRST_FLAGS[module] and flags[-1] == "debug"


def test_helpfull_lists_the_flags_of_libraries(fork):
    code, out, _ = fork("advmoe_jax.evaluate", "--helpfull")
    assert code == 0 and "--verbosity" in out and "--workdir" in out


def test_the_attacks_are_listed_by_what_they_need(fork):
    code, out, err = fork("advmoe_jax.evaluate", "--attacks=list")
    assert (code, err) == (0, "")
    groups = dict(re.findall(r"^For (.*?):\n(.*?)(?:\n\n|\Z)", out, flags=re.DOTALL | re.MULTILINE))
    names = {need: re.findall(r"^(\w\S*)  ", text, flags=re.M) for need, text in groups.items()}
    assert {"pgdN", "autoattack", "square[N]", "clean"} <= set(names["any network"])
    assert {"moe[N]", "ste_pgdN", "router"} <= set(names["networks with a router"])
    assert {"exit1[_N]", "exit_suite[N]"} <= set(names["networks with exits"])
    assert "exit_joint[N]" in names["networks with exits and a router"]
    assert re.search(r"^cw\[N\] +1,000  l2 ", out, flags=re.MULTILINE)
    kinds = {re.sub(r"\[_?N\]|N$", "", name) for group in names.values() for name in group}
    assert kinds == {"name"} | {n for n, record in ATTACKS.items() if record.side_exit <= 1}


# ------------------------------------------------------------------------ all commands in one name


def advmoe(*arguments, **options):
    command = [sys.executable, "-m", "advmoe_jax", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, **options)


def test_the_package_lists_its_commands():
    done = advmoe()
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  (\w+) +[A-Z].*\.$", done.stdout, flags=re.MULTILINE)
    assert listed == list(COMMANDS) and len(done.stdout.splitlines()) <= 24


def test_a_command_by_its_name(fork):
    said = advmoe("cost", "--model=resnet18_cifar", "--json")
    expected = fork("advmoe_jax.cost", "--model=resnet18_cifar", "--json")
    assert [said.returncode, said.stdout] == expected[:2]
    wrong = advmoe("evaluate", "--workdir=no/such/run")
    assert "no/such/run holds no run" in error_of(wrong.returncode, wrong.stdout, wrong.stderr)


def test_a_wrong_command():
    for word, said in (
        ("evalute", "did you mean evaluate?"),
        ("zzz", "choose one of prepare, tra"),
    ):
        done = advmoe(word)
        assert said in error_of(done.returncode, done.stdout, done.stderr)


def test_the_console_script_is_there():
    (target,) = re.findall(r'"advmoe=([\w.]+:\w+)"', (REPOSITORY / "setup.py").read_text())
    module, name = target.split(":")
    assert callable(getattr(importlib.import_module(module), name))


COMPLETE = """
eval "$1"; line="$2"; read -ra words <<< "${line//=/ = }"
[ "${line: -1}" = " " ] && words+=("")
COMP_LINE="$line" COMP_POINT=${#line} COMP_WORDS=("${words[@]}") COMP_CWORD=$((${#words[@]} - 1))
[ "${words[-1]}" = "=" ] && COMP_WORDS+=("") && COMP_CWORD=$((COMP_CWORD + 1))
_advmoe; printf '%s\\n' "${COMPREPLY[@]}"
"""


def test_the_tab_key():
    script = advmoe("--completion=bash").stdout

    def completed(line):
        command = ["bash", "-c", COMPLETE, "bash", script, line]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("advmoe ") == list(COMMANDS)
    assert completed("advmoe ex") == ["explain", "export_run", "export_torch"]
    assert completed("advmoe train --wo") == ["--workdir="]
    both = ["configs/digits.py", "configs/digits_certified.py"]
    assert sorted(completed("advmoe train --config=configs/dig")) == both
    assert completed("advmoe train --config.balance.im") == ["--config.balance.importance="]
    assert completed("advmoe compare --config.run.loss.be") == ["--config.run.loss.beta="]
    assert completed("advmoe evaluate --checkpoint=") == ["best", "last"]
    assert completed("advmoe evaluate --check") == ["--checkpoint="]
    assert completed("advmoe leaderboard laun") == ["launch"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no directories are named; see --help"),
        (("no/such",), "no/such: there is no such directory"),
        (("docs",), "there is nothing to show: docs holds no results"),
        (("--out=hdfs://x", "docs"), "--out=hdfs://x is no directory of this machine"),
    ],
)
def test_a_leaderboard_of_nothing(fork, arguments, said):
    assert said in error_of(*fork("advmoe_jax.leaderboard", *arguments))


def test_a_leaderboard(fork, tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        results = {"standard_accuracy": 0.5, "seed": seed, "config": {"seed": seed}}
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / name) for name in ("0", "1", "empty")]
    code, out, err = fork("advmoe_jax.leaderboard", *names, f"--out={tmp_path}/out")
    assert (code, err) == (0, "")
    assert "empty holds no results" in out and "1 line of 2 runs: " in out
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"leaderboard.html", "leaderboard.csv"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("def get_config(:\n", "cannot be loaded: invalid syntax ({name}, line 1)"),
        ("x = 1\n", "cannot be loaded: module 'config_config' has no attribute 'get_config'"),
        ("import no_such_module\n", "cannot be loaded: No module named 'no_such_module'"),
        ("def get_config():\n    raise RuntimeError('a\\nb')\n", "cannot be loaded: a b"),
        ("def get_config():\n    raise ValueError('a')\n", "cannot be loaded: ValueError: a"),
        ("import sys\nsys.exit(0)\n", "cannot be loaded: it ends the program"),
        ("def get_config():\n    pass\n", "get_config() must return a ConfigDict"),
        ("def get_config():\n    return {'seed': 0}\n", "get_config() must return a ConfigDict"),
    ],
)
def test_a_config_file_that_cannot_be_loaded(train_error, tmp_path, content, said):
    (tmp_path / "my_config.py").write_text(content)
    expected = f"--config={tmp_path / 'my_config.py'}"
    line = train_error(f"--config={tmp_path / 'my_config.py'}")
    assert line.startswith(expected) and said.format(name="my_config.py") in line
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_lacks_a_value(train_error, tmp_path):
    text = (REPOSITORY / "configs" / "digits.py").read_text()
    text = text.replace("    return config", "    del config.model.ratio\n    return config")
    (tmp_path / "my_config.py").write_text(text)
    line = train_error(f"--config={tmp_path / 'my_config.py'}")
    assert line == "the config has no value for model.ratio; start from advmoe_jax.defaults"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.widht": 3}, "config.model.widht does not exist; did you mean config.model.width?"),
        ({"model": 3}, "config.model is a group; set one of its values: model.block_size, "),
        ({"num_epochs": "three"}, "flag --config.num_epochs=three: invalid literal"),
        ({"model.width": 2.5}, "flag --config.model.width=2.5: invalid literal"),
        ({"data.flip": "perhaps"}, "flag --config.data.flip=perhaps: "),
        ({"seed": -1}, "config.seed=-1 must lie in 0 to 4294967295"),
        ({"seed": 2**32}, "config.seed=4294967296 must lie in 0 to 4294967295"),
        ({"seed": 10**30}, "must lie in 0 to 4294967295"),
        ({"attack.epsilon": "800/255"}, "config.attack.epsilon=3.137"),
        ({"attack.epsilon": "8/0"}, "flag --config.attack.epsilon=8/0: "),
        ({"data.crop_padding": 9}, "crop_padding=9 is wider than the images, which are 8x8"),
        ({"evaluation.attacks": ""}, "config.evaluation.attacks names no attack"),
        ({"num_epochs": -1}, "config.num_epochs=-1 must be at least 1"),
        ({"num_devices": -1}, "config.num_devices=-1 must not be negative"),
        ({"loss.beta": "nan"}, "config.loss.beta=nan must be finite"),
        ({"num_devices": 3}, "num_devices=3, but this machine has 1"),
        ({"batch_size": 0}, "batch_size=0 is not a positive multiple of the 1 devices; try 1"),
        ({"batch_size": -8}, "batch_size=-8 is not a positive multiple"),
        ({"batch_size": 257}, "batch_size=257 is larger than the 256 images"),
        ({"model.num_experts": 0}, "model.num_experts=0 must be at least 1"),
        ({"model.name": "resnet19_cifar"}, "'resnet19_cifar' is unknown; did you mean 'resnet"),
        ({"model.mean": (0.5, 0.5)}, "model.mean has 2 values; the images have 1 channels"),
        ({"model.ratio": 0.0}, "model.ratio=0.0 must lie in (0, 1]"),
        ({"model.dtype": "int8"}, "model.dtype='int8' must be"),
        ({"method": "advmo"}, "method='advmo' is unknown; choose one of standard, at, trades"),
        ({"model.num_experts": 1}, "method='advmoe' trains a router, but model.num_experts=1"),
        (
            {"model.num_experts": 1, "method": "at", "evaluation.attacks": "router"},
            "attack 'router' is on the part 'router'; the network has backbone",
        ),
        ({"evaluation.attacks": "pgd5,pdg3"}, "attack 'pdg3' is unknown; choose from clean, fgsm"),
        ({"attack.epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"attack.norm": "l3"}, "norm 'l3' is unknown; choose one of linf, l2"),
        ({"attack.step_size": 0.0}, "config.attack: step_size=0.0 must be positive"),
        ({"optimizer.router.name": "sdg"}, "optimizer.router.name='sdg' is unknown; choose one of"),
        ({"data.source": "digit"}, "unknown data source 'digit': did you mean digits?"),
        ({"data.source": "image_folder"}, "image_folder needs a path"),
        ({"data.test_split": "val"}, "digits has no split 'val': name one of those it has"),
        ({"data.validation_fraction": 0.0}, "validation_fraction=0.0 must lie between 0 and 1"),
        ({"data.image_size": 20_000}, "an image may have 67,108,864 pixels"),
        ({"model.num_experts": 10**6}, "model.num_experts=1000000 must be at most 4096"),
        ({"model.width": 10**6}, "GiB of memory at the least, and this machine has"),
        ({"model.router.width": 10**6}, "make the network smaller"),
        ({"model.router.blocks": 10**6}, "model.router.blocks=1000000 must be at most 100"),
        ({"balance.warmup_epochs": 2**32}, "is longer than the run, of num_epochs=1"),
        ({"loss.awp_warmup_epochs": 1.5}, "is longer than the run, of num_epochs=1"),
        ({"num_epochs": 2**31}, "num_epochs=2147483648 is beyond what is counted here"),
        (
            {
                **{"method": "hydra", "model.num_experts": 1, "model.keep": 0.5},
                **{"num_epochs": 4, "pruning.epochs": 1, "evaluation.attacks": "fgsm"},
            },
            "pruning.dense_run",
        ),
    ],
)
def test_a_value_that_cannot_be(train_error, changes, said):
    assert said in train_error(*small(**changes))


def test_a_batch_that_the_devices_cannot_share(train_error):
    line = train_error(*small(batch_size=100), devices=8)
    assert line == "batch_size=100 is not a positive multiple of the 8 devices; try 96"


# -------------------------------------------------------------------------------- data and files


@pytest.fixture
def folder(tmp_path):
    """Images of two classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
                pixels.save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def with_images(folder):
    return small(data__source="image_folder", data__path=folder)


def test_a_missing_data_directory(train_error, tmp_path):
    assert f"{tmp_path / 'none'} does not exist" in train_error(*with_images(tmp_path / "none"))


def test_an_image_that_cannot_be_decoded(train_error, folder):
    path = folder / "train" / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:60])
    line = train_error(*with_images(folder))
    assert "train/dog/3.png cannot be decoded" in line and str(folder) in line


def test_a_class_without_images(train_error, folder):
    (folder / "train" / "eel").mkdir()
    assert f"train/eel in {folder} holds no images" in train_error(*with_images(folder))


def test_a_split_without_classes(train_error, folder):
    for path in (folder / "test").glob("*/*"):
        path.unlink()
    for path in (folder / "test").iterdir():
        path.rmdir()
    assert "has no class directories" in train_error(*with_images(folder))
    (folder / "test").rmdir()
    assert "has no split 'test'" in train_error(*with_images(folder))


def test_a_workdir_that_cannot_be_made(train_error, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--workdir={workdir} cannot be made: " in train_error(*small(), workdir=workdir)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["a[b]c", "a\\b", "a*", "a?"])
def test_a_workdir_that_is_a_pattern(train_error, tmp_path, name):
    workdir = tmp_path / name / "run"
    assert "takes for a pattern" in train_error(*small(), workdir=workdir)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_not_utf_8(fork, tmp_path):
    for module, more in (("train", small()), ("evaluate", []), ("explain", [])):
        line = error_of(*fork(f"advmoe_jax.{module}", f"--workdir={tmp_path}/a\udcff", *more))
        assert "\\udcff' lies at a path that is not UTF-8" in line
    assert list(tmp_path.iterdir()) == []


def test_storage_of_other_kinds(fork):
    for module, more in (("train", small()), ("evaluate", []), ("compare", COMPARE[:1])):
        line = error_of(*fork(f"advmoe_jax.{module}", "--workdir=hdfs://host/run", *more))
        assert "hdfs:// is not supported: use a local directory, gs:// or s3://" in line
    assert not (REPOSITORY / "hdfs:").exists()


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_storage_without_its_library(fork):
    for module, more in (("train", small()), ("evaluate", []), ("compare", COMPARE[:1])):
        line = error_of(*fork(f"advmoe_jax.{module}", "--workdir=gs://bucket/run", *more))
        assert "--workdir=gs://bucket/run is reached by gcsfs, which is not installed: " in line
    assert not (REPOSITORY / "gs:").exists()


def test_buckets_that_cannot_be_used(fork, tmp_path):
    def line(module, name, *more):
        where = f"--workdir=gs://{name}/run"
        return error_of(*fork(f"advmoe_jax.{module}", where, *more, ADVMOE_BUCKETS=str(tmp_path)))

    there = "gs://nowhere/run/config.json"
    assert line("train", "nowhere", *small()) == (
        f"{there} cannot be written: there is no such bucket"
    )
    assert f"{there} does not exist: gs://nowhere/run holds no run" in line("explain", "nowhere")
    for module, more in (("train", small()), ("evaluate", [])):
        said = line(module, "forbidden", *more)
        assert said.startswith("cannot read or write: Forbidden: forbidden/run")
        assert line(module, "unreachable", *more) == (
            "the storage cannot be reached: Could not connect to the endpoint URL; what was saved "
            "is kept: the same command goes on"
        )


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "results.json", "checkpoints"])
def test_a_directory_or_a_file_in_the_place_of_the_other(fork, tmp_path, name):
    wrong = tmp_path / "run" / name
    wrong.parent.mkdir()
    wrong.write_text("mine") if name == "checkpoints" else wrong.mkdir()
    code, out, err = fork("advmoe_jax.train", f"--workdir={wrong.parent}", *small())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert str(wrong) in err and "Traceback" not in out


def test_show_prints_what_would_be_trained_and_does_nothing(fork, tmp_path):
    code, out, err = fork("advmoe_jax.train", *small(), "--show", f"--workdir={tmp_path / 'run'}")
    assert (code, err) == (0, "")
    for said in ("num_epochs: 1\n", "256 training", "MACs per image", "1 epochs of 4 steps"):
        assert said in out
    assert list(tmp_path.iterdir()) == []
    assert fork("advmoe_jax.train", *small(), "--show")[0] == 0  # it needs no directory


def test_debug_shows_the_traceback(fork, tmp_path):
    (tmp_path / "config.json").mkdir()
    code, _, err = fork("advmoe_jax.train", f"--workdir={tmp_path}", "--debug", *small())
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_a_platform_that_is_not_there(environment, tmp_path):
    command = [sys.executable, "-m", "advmoe_jax.train", f"--workdir={tmp_path / 'x'}"]
    command += small(model__name="resnet10_cifar")  # a process that knows none of the tests' own
    found = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2, found.stderr
    assert found.stderr.splitlines()[-1].startswith(
        "error: JAX cannot start on JAX_PLATFORMS='tpu'"
    )
    assert "Traceback" not in found.stderr


def test_a_disk_without_room_for_the_config(train_error, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.partial").symlink_to("/dev/full")
    assert "disk full: cannot write " in train_error(*small())
    assert not (tmp_path / "run" / "config.json").exists()


# ------------------------------------------------------------------------------ an existing run


@pytest.fixture
def run(fork, tmp_path):
    """A directory as a training leaves it, as far as these commands look."""
    workdir = tmp_path / "run"
    # Refused, but for a value that is not in the config's own hands: the config is saved.
    error_of(*fork("advmoe_jax.train", f"--workdir={workdir}", *small(data__crop_padding=9)))
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["crop_padding"] = 0
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    (workdir / "checkpoints" / "4" / "state").write_text("precious")
    (workdir / "metrics.jsonl").write_text('{"epoch": 1, "step": 4}\n')
    (workdir / "results.json").write_text('{"standard_accuracy": 0.5}\n')
    return workdir


def test_a_workdir_of_another_config(fork, run):
    before = contents(run)
    for changes, said in {
        "seed": (3, "seed=0, this command has 3: use another --workdir"),
        "model.mean": ((0.25,), "model.mean=[0.5], this command has (0.25,)"),
    }.items():
        arguments = small(**{changes: said[0]})
        line = error_of(*fork("advmoe_jax.train", f"--workdir={run}", *arguments))
        assert line.startswith(f"{run} holds a run with ") and said[1] in line
    assert contents(run) == before


@pytest.mark.parametrize("damage", ["{", "", '{"seed": 0}'])
def test_a_damaged_config_json(fork, evaluate_error, run, damage):
    (run / "config.json").write_text(damage)
    before = contents(run)
    said = "has no value for" if damage.startswith('{"') else f"{run / 'config.json'} is damaged"
    assert said in error_of(*fork("advmoe_jax.train", f"--workdir={run}", *small()))
    assert said in evaluate_error(f"--workdir={run}")
    assert contents(run) == before


def test_a_damaged_results_json(evaluate_error, run):
    (run / "results.json").write_text('{"standard_accuracy": 0.')
    before = contents(run)
    assert f"{run / 'results.json'} is damaged" in evaluate_error(f"--workdir={run}")
    assert contents(run) == before


def test_an_out_that_holds_a_run(evaluate_error, run):
    before = contents(run)
    line = evaluate_error(f"--workdir={run}", f"--out={run}")
    assert "holds a run or a comparison, whose results would be lost" in line
    assert contents(run) == before


def test_evaluating_what_has_no_checkpoint(evaluate_error, run):
    (run / "checkpoints" / "4" / "state").unlink()
    (run / "checkpoints" / "4").rmdir()
    for _ in range(2):
        line = evaluate_error(f"--workdir={run}")
        assert line == f"{run} has no intact checkpoint to evaluate; train first"
        if (run / "checkpoints").exists():
            (run / "checkpoints").rmdir()


def test_evaluating_with_an_attack_that_cannot_be(evaluate_error, run):
    before = contents(run)
    line = evaluate_error(f"--workdir={run}", "--attacks=clean,autoatack")
    assert line.startswith("attack 'autoatack' is unknown; choose from clean, fgsm")
    assert contents(run) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epsilon=8/0"], "--epsilon=8/0 is no radius: give a number such as 0.031 or 8/255"),
        (["--epsilon=-0.1"], "--epsilon=-0.1 is no radius"),
        (["--epsilon=1e999"], "--epsilon=1e999 is no radius"),
        (["--epsilon=8"], "--epsilon=8 is wider than the pixels' range"),
        (["--epsilon=0"], "--norm and --epsilon: epsilon=0.0 must be positive"),
        (["--norm=l2"], "--norm=l2 needs an --epsilon: the config's 0.2 is a radius in linf"),
        (["--norm=l3", "--epsilon=1"], "norm 'l3' is unknown; choose one of linf, l2, l1"),
        (["--attacks=cw"], "attack 'cw': this attack is defined for l2, not for linf; --norm"),
        (["--attacks=deepfool", "--norm=l1", "--epsilon=1"], "'deepfool': DeepFool is defined for"),
        (["--batch_size=-1"], "--batch_size=-1 must not be negative"),
        (["--examples=-1"], "--examples=-1 must not be negative"),
        (["--examples=many"], "flag --examples=many"),
    ],
)
def test_evaluating_with_flags_that_cannot_be(evaluate_error, run, arguments, said):
    before = contents(run)
    assert said in evaluate_error(f"--workdir={run}", *arguments)
    assert contents(run) == before


# ----------------------------------------------------------------------------------------- costs

COST = "advmoe_jax.cost"


def test_the_cost_of_a_network_as_json(fork):
    arguments = ["--model=resnet18_cifar", "--num_experts=2", "--ratio=0.5", "--json"]
    code, out, err = fork(COST, *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "params": {
            "total": 5_834_652,
            "router": 269_202,
            "backbone": 5_565_450,
            "pathway": 2_809_866,
        },
        "macs": {
            "total": 192_268_928,
            "router": 40_550_528,
            "pathway": 151_718_400,
            "dense": 555_422_720,
        },
    }


@pytest.mark.slow
def test_the_cost_of_a_network_as_a_table(fork):
    arguments = ["--model=densenet_cifar", "--num_experts=2", "--ratio=0.5"]
    _, small, _ = fork(COST, *arguments)
    assert "10,137,728" in small and "0.392 of the dense network's MACs" in small
    _, published, _ = fork(COST, *arguments, "--router=published")
    assert "40,550,528" in published
    _, per_layer, _ = fork(COST, *arguments, "--router=per_layer")
    assert "0.253 of the dense" in per_layer


def test_the_cost_of_a_sparse_network(fork):
    code, out, _ = fork(COST, "--model=vgg11", "--target=0.3")
    assert code == 0 and "0.299 of the dense network's MACs" in out and "config.model.keep=" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--model is missing"),
        (["--model=resnet81_cifar"], "did you mean 'resnet38_cifar'"),
        (["--model=vgg11", "--num_experts=2", "--router=small"], "choose one of published, at_32"),
        (["--model=vgg11", "--image_size=0"], "--image_size=0 must be at least 1"),
        (["--model=vgg11", "--target=1.5"], "--target=1.5 must lie in (0, 1)"),
        (["--model=vgg11", "--ratio=0"], "model.ratio=0"),
    ],
)
def test_costs_that_cannot_be(fork, arguments, said):
    assert said in error_of(*fork(COST, *arguments))


# --------------------------------------------------------------------------- as a user starts them


@pytest.mark.parametrize(
    ("module", "arguments", "said"),
    [
        ("train", ["--config=configs/digits.py"], "--workdir is missing"),
        (
            "train",
            [*small(), "--config.model.widht=3", "--workdir={tmp}/x"],
            "did you mean config.",
        ),
        ("train", ["--config={tmp}/wrong.py", "--workdir={tmp}/x"], "invalid syntax (wrong.py"),
        (
            "train",
            [*small(model__name="resnet10_cifar", data__source="digit"), "--workdir={tmp}/x"],
            "unknown data source",
        ),
        (
            "train",
            [*small(model__name="resnet10_cifar", batch_size=0), "--workdir={tmp}/x"],
            "batch_size=0 is not a positive",
        ),
        ("evaluate", ["--workdir={tmp}/x"], "{tmp}/x holds no run"),
    ],
)
def test_true_processes(environment, tmp_path, module, arguments, said):
    (tmp_path / "wrong.py").write_text("def get_config(:\n")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            f"advmoe_jax.{module}",
            *(a.format(tmp=tmp_path) for a in arguments),
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    line = error_of(process.returncode, process.stdout, process.stderr)
    assert said.format(tmp=tmp_path) in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.patch=3", "model.patch=3 does not divide the images' side, 8"),
        ("model.placement=9", "model.placement='9' names blocks that do not exist: there are 4"),
        ("model.top_k=5", "model.top_k=5 must lie between 1 and num_experts=4"),
        ("model.image_size=28", "model.image_size=28, but the images are 8x8"),
        ("model.router.width=3", "config.model.router.width does not exist"),
        ("method=hydra", "method='hydra' prunes channels"),
        ("data.mixup=-1", "config.data.mixup=-1.0 must not be negative"),
        ("data.crop_area=0", "config.data.crop_area=0.0 must lie in (0, 1]"),
    ],
)
def test_a_transformer_that_cannot_be_trained(fork, tmp_path, change, said):
    arguments = ("--config=configs/vmoe_digits.py", f"--config.{change}")
    line = error_of(*fork("advmoe_jax.train", f"--workdir={tmp_path / 'run'}", *arguments))
    assert said in line


def test_the_cost_of_a_transformer(fork):
    code, out, err = fork("advmoe_jax.cost", "--model=vit_tiny_8", "--num_experts=4", "--json")
    assert code == 0, err
    assert '"total": 60970' in out and '"pathway": 35562' in out  # three channels: 256 more each
    line = error_of(*fork("advmoe_jax.cost", "--model=vit_tiny_8", "--ratio=0.5"))
    assert "--ratio is for convolutional networks, not for vit_tiny_8" in line
