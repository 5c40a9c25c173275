"""The training command as a process: killed, stopped, out of disk space, and given again.

The network is a ResNet of one block, so that a process spends seconds and not minutes; programs
compile once for all processes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import compiling
import one_block
from advmoe_jax import config as config_lib
from advmoe_jax import storage

pytestmark = pytest.mark.slow  # all of them are processes
REPOSITORY = Path(__file__).parents[1]
STEPS, EPOCHS = 48, 3
VALUES = one_block.SMALL | {
    "data.train_examples": 16 * STEPS,
    "num_epochs": EPOCHS,
    "evaluation.attacks": "pgd2",
    "evaluation.step_size": 0.1,
}


class Commands:
    """Starts the commands with one device, and compiled programs of their own."""

    def __init__(self, cache):
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compiling.flags(),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, workdir, *arguments, config="digits", module="advmoe_jax.train"):
        """A process; a training has ``VALUES``, unless the arguments say something else."""
        if module == "advmoe_jax.train":
            arguments = (*one_block.flags(VALUES, config), *arguments)
        return subprocess.Popen(
            [sys.executable, str(one_block.SCRIPT), module, f"--workdir={workdir}", *arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, workdir, *arguments, code=0, **settings):
        """(what was printed, what was said on stderr) of a command that ends with ``code``."""
        process = self.start(workdir, *arguments, **settings)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, out + err
        return out, err

    def interrupt(self, workdir, moment, number):
        """Sends a signal when ``moment()`` is true; (exit code, what was printed)."""
        process = self.start(workdir)
        deadline = time.monotonic() + 300
        while not moment():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the moment never came: {process.communicate()}")
            time.sleep(0.001)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in err
        return process.returncode, out


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("cache"))


def error_of(err):
    """The one line that a failed command leaves."""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved(workdir):
    """Steps of the finished checkpoints."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def outcome(workdir):
    """All that a run leaves and that does not depend on the clock."""
    results = json.loads((workdir / "results.json").read_text())
    names = ("params_sha256", "evaluated", "steps", "standard_accuracy", "robust_accuracy")
    epochs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for epoch in epochs:
        del epoch["seconds"], epoch["compile_seconds"], epoch["images_per_second"]
    return {name: results[name] for name in (*names, "routing", "warnings")}, epochs


@pytest.fixture(scope="module")
def reference(commands, tmp_path_factory):
    """(directory, what was printed) of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    return workdir, commands.run(workdir)[0]


def killed(commands, workdir):
    def evaluating():
        return saved(workdir)[-1:] == [STEPS * EPOCHS]

    def saving():
        directory = workdir / "checkpoints"  # where an unfinished one has another name
        return lines(workdir) == 1 and directory.exists() and any(directory.iterdir())

    moments = {
        "compiling": ((workdir / "config.json").exists, 1.0),
        "saving": (saving, 0.0),
        "third epoch": (lambda: 2 * STEPS in saved(workdir), 0.1),
        "evaluation": (evaluating, 0.5),
    }
    for name, (moment, delay) in moments.items():

        def later(moment=moment, delay=delay):
            return moment() and (time.sleep(delay) or True)

        assert commands.interrupt(workdir, later, signal.SIGKILL)[0] == -signal.SIGKILL, name
        assert not (workdir / "results.json").exists(), name
    assert lines(workdir) == EPOCHS
    return commands.run(workdir)


def terminated(commands, workdir):
    # Amid the second epoch; on a machine that is busy elsewhere, at its ends. `test_loop.py` has
    # each case for certain.
    def moment():
        return lines(workdir) and (time.sleep(0.1) or True)

    code, out = commands.interrupt(workdir, moment, signal.SIGTERM)
    return code, out, saved(workdir), commands.run(workdir)[0]


def damaged(commands, workdir, reference):
    shutil.copytree(reference[0], workdir)
    (workdir / "results.json").unlink()
    last = workdir / "checkpoints" / str(STEPS * EPOCHS)
    for file in (last / "state" / "d").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    return commands.run(workdir)


def full_disk(commands, workdir, reference):
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(workdir)]
    if subprocess.run(mount, capture_output=True).returncode:
        return None
    try:
        # Room for the first checkpoint and half of the second.
        files = [*(reference[0] / "checkpoints" / str(STEPS)).rglob("*")]
        blocks = sum(-(-file.stat().st_size // 4096) for file in files) + 16
        resize = ["mount", "-o", f"remount,size={int(1.5 * blocks) * 4}k", str(workdir)]
        subprocess.run(resize, check=True)
        _, err = commands.run(workdir, code=2)
        before = saved(workdir)
        subprocess.run(["mount", "-o", "remount,size=64m", str(workdir)], check=True)
        out, _ = commands.run(workdir)
        return err, before, out, outcome(workdir)
    finally:
        subprocess.run(["umount", "--lazy", str(workdir)], check=True)


DENSE = ("--config.model.num_experts=1", "--config.method=standard", "--config.num_epochs=1")


def diverging(commands, workdir):
    rate = "--config.optimizer.experts.learning_rate=1e6"
    return error_of(commands.run(workdir, *DENSE, rate, code=2)[1])


def dense(commands, workdir):
    first, _ = commands.run(workdir, *DENSE)
    before, files = outcome(workdir), unchanging(workdir)
    again, err = commands.run(workdir, *DENSE)
    return first, again, err, (before, files) == (outcome(workdir), unchanging(workdir))


def unchanging(workdir):
    names = ("metrics.jsonl", "config.json")
    return [(workdir / name).read_bytes() for name in names], saved(workdir)


@pytest.fixture(scope="module")
def chains(commands, reference, tmp_path_factory):
    """name -> (directory, what a chain of commands gave); two chains at a time."""
    root = tmp_path_factory.mktemp("chains")
    with ThreadPoolExecutor(2) as pool:
        later = {
            "killed": pool.submit(killed, commands, root / "killed"),
            "terminated": pool.submit(terminated, commands, root / "terminated"),
            "damaged": pool.submit(damaged, commands, root / "damaged", reference),
            "full": pool.submit(full_disk, commands, root / "full", reference),
            "diverging": pool.submit(diverging, commands, root / "diverging"),
            "dense": pool.submit(dense, commands, root / "dense"),
        }
        yield lambda name: (root / name, later[name].result())


def test_a_run_says_what_it_did(reference):
    workdir, out = reference
    said = out.splitlines()
    for epoch in range(1, EPOCHS + 1):
        assert f"epoch   {epoch}/{EPOCHS}  loss " in out
    assert f"results in {workdir / 'results.json'}" in said
    assert said[-1] == f"report in {workdir / 'report.html'}"
    for name in ("report.html", "curves.png"):
        assert (workdir / name).stat().st_size > 1000
    events = [path.read_bytes() for path in (workdir / "tensorboard").iterdir()]
    assert any(b"train/loss" in content for content in events)


def test_results_hold_the_documented_names(reference):
    results = json.loads((reference[0] / "results.json").read_text())
    assert list(results) == [
        "method",
        "model",
        "dataset",
        "seed",
        "steps",
        "standard_accuracy",
        "robust_accuracy",
        "attacks",
        "routing",
        "images_per_second",
        "num_params",
        "macs_per_image",
        "cost",
        "params_sha256",
        "evaluated",
        "warnings",
        "device",
        "versions",
        "git_commit",
        "config",
    ]
    assert results["method"] == "advmoe" and results["model"] == "resnet4_cifar"
    assert results["dataset"] == "digits" and results["seed"] == 0
    assert results["steps"] == STEPS * EPOCHS
    routing, robust = results["routing"], results["robust_accuracy"]
    certified = {"certified_agreement", "certified_within"}
    assert routing.keys() == {"load", "entropy", "agreement", *certified}
    assert robust.keys() == routing["agreement"].keys() == {"pgd2"}
    shares = [results["standard_accuracy"], *robust.values(), *routing["load"]]
    shares.append(routing["certified_agreement"])
    assert all(0 <= share <= 1 for share in [*shares, *routing["agreement"].values()])
    assert sum(routing["load"]) == pytest.approx(1) and 0 <= routing["entropy"] <= np.log(2) + 1e-6
    assert results["attacks"] == {
        "clean": {"examples": 360, "seed": 0},
        "pgd2": {
            "norm": "linf",
            "epsilon": 0.2,
            "num_steps": 2,
            "step_size": 0.1,
            "restarts": 1,
            "examples": 360,
            "seed": 0,
        },
    }
    assert results["images_per_second"].keys() == {"clean", "pgd2"}
    assert min(results["images_per_second"].values()) > 0
    assert results["num_params"] > 1000 and results["macs_per_image"] > 1000
    assert len(results["params_sha256"]) == len(results["evaluated"]["params_sha256"]) == 64
    assert results["evaluated"].keys() == {"checkpoint", "step", "params_sha256"}
    assert results["evaluated"]["checkpoint"] == "best"
    assert results["device"].startswith("1 x ") and "jax" in results["versions"]


def test_the_config_is_saved_whole(reference):
    workdir, _ = reference
    saved_config = json.loads((workdir / "config.json").read_text())
    config = config_lib.load(workdir / "config.json")
    for name, value in VALUES.items():
        assert config_lib.value(config, name) == value
    assert json.loads((workdir / "results.json").read_text())["config"] == saved_config


def test_metrics_hold_the_documented_names(reference):
    _, epochs = outcome(reference[0])
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert [epoch["step"] for epoch in epochs] == [STEPS, 2 * STEPS, 3 * STEPS]
    accuracies = {"standard_accuracy", "robust_accuracy"}
    for epoch in epochs:
        assert epoch.keys() == {"epoch", "step", "train", "validation", "warnings"}
        assert epoch["train"].keys() == {"loss", "router_loss", "routing"} | accuracies
        assert epoch["validation"].keys() == {"routing"} | accuracies
        for part in (epoch["train"], epoch["validation"]):
            assert part["routing"].keys() == {"load", "entropy", "agreement"}
            assert sum(part["routing"]["load"]) == pytest.approx(1)


def test_a_warning_stands_in_the_metrics_and_on_the_terminal(reference):
    workdir, out = reference
    results, epochs = outcome(workdir)
    for found, load in [
        *((epoch["warnings"], epoch["train"]["routing"]["load"]) for epoch in epochs),
        (results["warnings"], results["routing"]["load"]),
    ]:
        assert len(found) == sum(share < 0.01 for share in load)
    for epoch in epochs:
        assert all(f"warning: {warning}\n" in out for warning in epoch["warnings"])


def test_the_best_checkpoint_is_evaluated(reference):
    results, epochs = outcome(reference[0])
    robust = [epoch["validation"]["robust_accuracy"] for epoch in epochs]
    assert results["evaluated"]["step"] == epochs[robust.index(max(robust))]["step"]


def test_killed_four_times_and_given_again_costs_no_bit(chains, reference):
    workdir, (out, _) = chains("killed")
    assert "trained already" in out
    assert outcome(workdir) == outcome(reference[0])


def test_sigterm_saves_first_and_costs_no_bit(chains, reference):
    workdir, (code, out, steps, rest) = chains("terminated")
    assert code == 0 and out.splitlines()[-1].startswith("stopped by SIGTERM; saved")
    assert steps[0] == STEPS and steps[-1] <= 2 * STEPS
    assert f"going on from step {steps[-1]}, epoch {steps[-1] // STEPS + 1}" in rest
    assert outcome(workdir) == outcome(reference[0])


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(chains, reference):
    workdir, (out, err) = chains("damaged")
    assert f"checkpoint {workdir / 'checkpoints' / str(STEPS * EPOCHS)} is damaged" in err
    assert f"going on from step {STEPS * (EPOCHS - 1)}, epoch {EPOCHS}" in out
    assert outcome(workdir) == outcome(reference[0])
    assert (workdir / "checkpoints" / "damaged" / f"{STEPS * EPOCHS}-1").is_dir()


def test_a_finished_run_given_again_prints_its_results_and_changes_nothing(chains):
    workdir, (first, again, err, same) = chains("dense")
    assert same and not err
    assert f"trained already, {STEPS} steps" in again and "epoch  " not in again
    for line in ("standard, resnet4_cifar on digits", "clean ", "pgd2 ", "params sha256 "):
        assert line in first and line in again
    assert f"results in {workdir / 'results.json'}" in again


def test_a_disk_without_room_for_checkpoints(chains, reference):
    _, found = chains("full")
    if found is None:
        pytest.skip("mounting a small disk needs root")
    err, before, out, after = found
    assert "disk full" in error_of(err)
    assert before in ([STEPS], [STEPS, 2 * STEPS])
    assert f"going on from step {before[-1]}, epoch {len(before) + 1}" in out
    assert after == outcome(reference[0])


def test_a_run_that_diverges_says_so(chains):
    workdir, error = chains("diverging")
    assert error.startswith("loss (nan) is not finite at step ")
    assert "training has diverged; nothing was saved yet. Try a lower optimizer.exp" in error
    assert saved(workdir) == []


def test_a_dense_network_has_no_routing(chains):
    workdir, (out, *_) = chains("dense")
    results, (epoch,) = outcome(workdir)
    assert results["routing"] is None and results["warnings"] == epoch["warnings"] == []
    assert epoch["validation"]["routing"] is None
    assert epoch["train"].keys() == {"loss", "standard_accuracy"}
    assert "load" not in out and "warning" not in out and "routes" not in out


def test_cifar10_from_an_archive_that_stays_packed(commands, part_of_cifar10, tmp_path):
    values = {
        "data.source": "image_folder",
        "data.path": part_of_cifar10,
        "data.train_examples": 64,
        "batch_size": 32,
        "num_epochs": 1,
        "evaluation.batch_size": 100,
        "evaluation.attacks": "clean",
    }
    workdir, beside = tmp_path / "run", sorted(part_of_cifar10.parent.iterdir())
    overrides = (f"--config.{name}={value}" for name, value in values.items())
    _, err = commands.run(workdir, *overrides, config="cifar10_resnet18")
    results = json.loads((workdir / "results.json").read_text())
    assert not err and results["dataset"] == "cifar10_jpeg" and results["steps"] == 2
    assert results["attacks"]["clean"]["examples"] > 32
    fewer = ("--examples=32", "--attacks=clean,fgsm")
    commands.run(workdir, *fewer, module="advmoe_jax.evaluate")
    results = json.loads((workdir / "results.json").read_text())
    assert (
        results["attacks"]["clean@32"]["examples"] == results["attacks"]["fgsm"]["examples"] == 32
    )
    assert results["attacks"]["clean"]["examples"] > 32  # and nothing fuller is replaced
    assert sorted(part_of_cifar10.parent.iterdir()) == beside
    assert not any(path.suffix in (".jpg", ".jpeg", ".png") for path in tmp_path.rglob("*/*/*"))


def test_hydra_prunes_a_dense_run(commands, tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    few = ["--config.num_epochs=2", "--config.data.train_examples=128"]
    few += ["--config.model.num_experts=1", "--config.model.ratio=1.0", "--config.model.width=8"]
    hydra = [*few, "--config.method=hydra", "--config.model.keep=0.4", "--config.pruning.epochs=1"]
    _, err = commands.run(sparse, *hydra, code=2)
    assert "set pruning.dense_run" in error_of(err)
    commands.run(dense, *few, "--config.method=trades")
    commands.run(sparse, *hydra, f"--config.pruning.dense_run={dense}")
    results = json.loads((sparse / "results.json").read_text())
    macs = results["cost"]["macs"]
    assert 0.3 < macs["total"] / macs["dense"] < 0.5
    assert results["macs_per_image"] == macs["total"]
    assert results["routing"] is None and 0 < results["standard_accuracy"] <= 1


def test_in_a_bucket_a_run_is_the_same(commands, reference, bucket, tmp_path):
    """Stopped and gone on with, it has the bits of one on a disk; the other commands take it."""
    there = Commands(commands.environment["JAX_COMPILATION_CACHE_DIR"])
    record = bucket / "checkpoints" / str(STEPS) / "record" / "metadata"
    code, out = there.interrupt(bucket, record.exists, signal.SIGTERM)
    assert code == 0 and "stopped by SIGTERM; saved" in out
    assert not (bucket / "results.json").exists()
    out, _ = there.run(bucket)
    assert "going on from step " in out and f"report in {bucket}/report.html" in out
    assert outcome(bucket) == outcome(reference[0])
    names = {x.relative_to(reference[0]).as_posix() for x in reference[0].rglob("*")}
    apart = ("checkpoints/", "tensorboard/")  # of the moment of the signal, and of the clock
    found = {x for x in storage.files_in(bucket) if not any(part in x for part in apart)}
    assert found <= names
    events = [path.read_bytes() for path in (bucket / "tensorboard").iterdir()]
    assert len(events) == 2 and all(b"train/loss" in content for content in events)

    evaluation = ("--attacks=fgsm", "--examples=32", "--save_examples")
    there.run(bucket, *evaluation, f"--out={bucket}-out", module="advmoe_jax.evaluate")
    there.run(bucket, "--examples=32", module="advmoe_jax.explain")
    small = bucket.parent / "small.npz"
    export = (f"--file={small}", "--attacks=fgsm", "--examples=32", "--sample=16")
    there.run(bucket, *export, module="advmoe_jax.export_run")
    for file in (bucket / "explanation.json", bucket.parent / "runs-out/examples/fgsm.npz", small):
        assert file.is_file()
    assert not list(tmp_path.glob("advmoe-checkpoints-*"))
