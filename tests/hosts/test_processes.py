"""A run of several real processes on this machine: what it computes, and how it ends.

All of them share compiled programs, and every process of a run has its own virtual devices.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import compiling
import one_block
from advmoe_jax.training.checkpoint import Checkpointer
from one_block import SCRIPT, flags

pytestmark = pytest.mark.slow  # all of them are processes
REPOSITORY = Path(__file__).parents[2]
SMALL = one_block.SMALL | {"evaluation.attacks": "fgsm"}
DENSE = {"model.num_experts": 1, "method": "standard"}
EPOCHS, STEPS = 8, 24
SHORT = SMALL | DENSE | {"num_epochs": 1, "data.train_examples": 64}
LONG = SMALL | DENSE | {"num_epochs": EPOCHS, "data.train_examples": 16 * STEPS}
# When the other process is killed, gloo, which adds up between processes on CPUs, may abort the one
# that is left before it can say why (seen once; presumably amid an all-reduce).
GLOO = "gloo::EnforceNotMet"
AGAIN = "; give the same commands again: they go on from what was saved"


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


class Processes:
    """Starts the processes of a run, and sees that none is left."""

    def __init__(self, cache):
        self._started = []
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compiling.flags(),
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def popen(self, command, devices, **environment):
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self._environment | {"JAX_NUM_CPU_DEVICES": str(devices), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def start(self, count, devices, arguments, module="advmoe_jax.train", **environment):
        """``count`` processes of one run, with ``devices`` each; 0: one that knows of no others."""
        command = [sys.executable, str(SCRIPT), module, *map(str, arguments)]
        if count == 0:
            return [self.popen(command, devices, **environment)]
        where = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        return [
            self.popen([*command, *where, f"--process_id={index}"], devices, **environment)
            for index in range(count)
        ]

    def run(self, count, devices, arguments, module="advmoe_jax.train", **environment):
        """Runs them to their end, which is a good one."""
        for process in self.start(count, devices, arguments, module, **environment):
            assert ended(process)[::2] == (0, "")

    def close(self):
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def ended(process, seconds=900):
    """(exit code, what was printed, stderr)."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved(workdir):
    """Whether there is a finished checkpoint."""
    directory = workdir / "checkpoints"
    return directory.exists() and any(path.name.isdigit() for path in directory.iterdir())


def wait_for(moment, *running):
    deadline = time.monotonic() + 900
    while not moment():
        for process in running:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the moment never came: {process.communicate()}")
        time.sleep(0.005)


def outcome(workdir):
    """All that a run leaves and that does not depend on the clock."""
    results = json.loads((workdir / "results.json").read_text())
    names = ("params_sha256", "evaluated", "steps", "standard_accuracy", "robust_accuracy")
    epochs = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for epoch in epochs:
        del epoch["seconds"], epoch["compile_seconds"], epoch["images_per_second"]
    return {name: results[name] for name in (*names, "routing", "warnings")}, epochs


def arrays(workdir, folder):
    """name -> content of every npz of that folder."""
    return {path.stem: dict(np.load(path)) for path in (workdir / folder).glob("*.npz")}


def assert_equal_arrays(one, other, folder):
    found, others = arrays(one, folder), arrays(other, folder)
    assert found.keys() == others.keys() and found
    for name in found:
        assert found[name].keys() == others[name].keys()
        for part in found[name]:
            np.testing.assert_array_equal(found[name][part], others[name][part])


def test_two_by_two_equal_one_of_four(processes, tmp_path):
    values = SMALL | {"num_epochs": 1, "data.train_examples": 64}
    shapes = {"one": (1, 4), "two": (2, 2)}
    for name, shape in shapes.items():
        processes.run(*shape, [*flags(values), f"--workdir={tmp_path / name}"])
    one, two = (tmp_path / name for name in shapes)
    assert outcome(one) == outcome(two)
    assert_equal_arrays(one, two, "outcomes")
    # Of five images the last batch has three that are padding, of which none is counted.
    wanted = ["--attacks=apgd-ce,frozen_route", "--examples=21", "--batch_size=8"]
    for name, shape in shapes.items():
        arguments = [f"--workdir={tmp_path / name}", "--save_examples", *wanted]
        processes.run(*shape, arguments, module="advmoe_jax.evaluate")
    assert outcome(one) == outcome(two)
    assert len(arrays(one, "examples")) == 2
    assert len(arrays(two, "outcomes")["frozen_route"]["correct"]) == 21
    for folder in ("outcomes", "examples"):
        assert_equal_arrays(one, two, folder)


def test_experts_spread_over_two_processes(processes, bucket, tmp_path):
    """Trained by two, evaluated by two and by one, which alone has all of them.

    In a bucket one process writes, of what both hold.
    """
    values = {
        **{"model.layers": 2, "model.width": 8, "model.hidden": 8, "model.patch": 4},
        **{"batch_size": 16, "data.train_examples": 64, "num_epochs": 1, "attack.num_steps": 1},
        **{"evaluation.attacks": "fgsm", "evaluation.validation_steps": 1},
        **{f"optimizer.{group}.warmup_epochs": 0 for group in ("experts", "router")},
    }
    shapes = {"whole": ((1, 4), 1), "spread": ((2, 2), 4)}
    for name, (shape, shards) in shapes.items():
        asked = flags(values | {"expert_shards": shards}, "vmoe_digits")
        processes.run(*shape, [*asked, f"--workdir={tmp_path / name}"])
    buckets = {"ADVMOE_BUCKETS": os.environ["ADVMOE_BUCKETS"]}
    processes.run(2, 2, [*asked, f"--workdir={bucket}"], **buckets)
    weights = []
    for place in (*(tmp_path / name for name in shapes), bucket):
        with Checkpointer(place / "checkpoints", keep=1) as checkpointer:
            weights.append(checkpointer.restore_latest(None)[1])
    in_bucket = weights.pop()
    assert in_bucket.keys() == weights[1].keys()
    for name, array in weights[1].items():
        np.testing.assert_array_equal(in_bucket[name], array, err_msg=name)
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        # What is added to all keys changes no attention: its gradient is rounding alone, which Adam
        # brings to the size of any other.
        atol = 1e-4 if name.endswith("key/bias") else 1e-5
        np.testing.assert_allclose(weights[1][name], array, rtol=0, atol=atol, err_msg=name)
    wanted = ["--attacks=fgsm", "--examples=21", "--batch_size=8"]
    spread = f"--workdir={tmp_path / 'spread'}"
    for name, shape in {"two": (2, 2), "alone": (0, 1)}.items():
        arguments = [spread, f"--out={tmp_path / name}", *wanted]
        processes.run(*shape, arguments, module="advmoe_jax.evaluate")
    two, alone = (arrays(tmp_path / name, "outcomes") for name in ("two", "alone"))
    assert two.keys() == alone.keys() == {"clean", "fgsm"}
    for name, found in two.items():
        np.testing.assert_array_equal(found["predictions"], alone[name]["predictions"])


def test_two_by_two_equal_one_of_four_on_cifar10(processes, part_of_cifar10, tmp_path):
    values = (
        SMALL
        | DENSE
        | {
            "num_epochs": 1,
            "data.source": "image_folder",
            "data.path": part_of_cifar10,
            "data.train_examples": 64,
            "evaluation.batch_size": 100,
        }
    )
    for name, shape in {"one": (1, 4), "two": (2, 2)}.items():
        arguments = [*flags(values, "cifar10_resnet18"), f"--workdir={tmp_path / name}"]
        processes.run(*shape, arguments)
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def assert_close_runs(one, two):
    """Losses and parameters but for rounding: bits differ here, other than on the digits."""
    losses = [outcome(run)[1][0]["train"]["loss"] for run in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    found, others = (
        Checkpointer(run / "checkpoints", 1).restore_latest(None) for run in (one, two)
    )
    assert found[0] == others[0] == 4 and found[1].keys() == others[1].keys()
    for name, values in found[1].items():
        np.testing.assert_allclose(values, others[1][name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def short(processes, tmp_path_factory):
    """The directory of a short run of two processes."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    processes.run(2, 2, [*flags(SHORT), f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    """The directory of a run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    processes.run(1, 4, [*flags(LONG), f"--workdir={workdir}"])
    return workdir


def test_a_run_of_two_goes_on_whatever_befalls_it(processes, uninterrupted, tmp_path):
    """Killed and started again by itself, told to stop, killed where all meet; goes on as four."""
    workdir = tmp_path / "run"
    arguments = [*flags(LONG), f"--workdir={workdir}"]
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "{SCRIPT}" "$@"\n')
    python.chmod(0o755)
    local = processes.popen(
        ["bash", "launch/local.sh", "2", "--restarts=1", *arguments],
        devices=2,
        PYTHON=str(python),
        PORT=str(free_port()),
    )

    def second():
        children = Path(f"/proc/{local.pid}/task/{local.pid}/children").read_text().split()
        words = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        return next((int(pid) for pid in words if "--process_id=1" in words[pid]), None)

    wait_for(lambda: saved(workdir), local)
    killed = second()
    os.kill(killed, signal.SIGKILL)
    # All of the first start have ended before the second: what is written then is the second's.
    wait_for(lambda: second() not in (None, killed), local)
    before = lines(workdir)
    wait_for(lambda: lines(workdir) > before, local)
    os.kill(second(), signal.SIGTERM)
    code, out, err = ended(local)
    name = socket.gethostname()
    assert code == 0
    # Besides what bash says of a killed child, and JAX of the signal.
    others = ("launch/local.sh: line", "preemption_notifier.cc")
    told = [line for line in err.splitlines() if not any(o in line for o in others)]
    assert GLOO in err or told == [
        f"error: process 1 of 2 on {name} is gone: it was killed, or its machine has failed{AGAIN}",
        "a process has ended with code 75: start 1 of 1 again",
    ]
    assert told[-1].endswith(": start 1 of 1 again")
    assert "going on from step " in out
    assert out.count("stopped by SIGTERM; saved: the same command goes on") == 1
    assert not (workdir / "results.json").exists()

    before = lines(workdir)
    first, other = processes.start(2, 2, arguments)
    wait_for(lambda: lines(workdir) > before, first, other)
    first.kill()
    code, _, err = ended(other, 60)
    assert code != 0
    if GLOO not in err:
        assert code == 75
        assert err.startswith("error: process 0 of 2 at localhost:") and err.count("\n") == 1
        assert err.endswith(
            f", where all meet, is gone: it was killed, or its machine has failed{AGAIN}\n"
        )
    assert not (workdir / "results.json").exists()

    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    processes.run(4, 1, arguments)
    assert outcome(workdir) == outcome(uninterrupted)
    # On another number of devices: the same batches, and sums in another order.
    processes.run(0, 2, [*flags(LONG), f"--workdir={copy}"])
    (found, epochs), (expected, reference) = outcome(copy), outcome(uninterrupted)
    assert found["steps"] == expected["steps"] and len(epochs) == EPOCHS
    losses = [[epoch["train"]["loss"] for epoch in run] for run in (epochs, reference)]
    np.testing.assert_allclose(*losses, rtol=0.05)
    assert found["standard_accuracy"] == pytest.approx(expected["standard_accuracy"], abs=0.1)


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_hangs_for_good(processes, tmp_path, stopped):
    workdir = tmp_path / "run"
    endless = flags(LONG | {"num_epochs": 10**4})
    running = processes.start(2, 2, [*endless, f"--workdir={workdir}"])
    wait_for(lambda: lines(workdir) >= 1, *running)
    running[stopped].send_signal(signal.SIGSTOP)
    code, _, err = ended(running[1 - stopped], 60)
    assert code == 75 and err.count("\n") == 1
    assert err.startswith(f"error: process {stopped} of 2 ")
    assert " has not answered for 30 s: it hangs, or its machine cannot be reached" in err


def test_a_mistake_is_told_once_by_each(processes, tmp_path):
    values = LONG | {"batch_size": 18}
    for process in processes.start(2, 2, [*flags(values), f"--workdir={tmp_path / 'run'}"]):
        code, _, err = ended(process)
        assert code == 2 and err.count("\n") == 1
        assert "batch_size=18 is not a positive multiple of the 4 devices" in err


def test_an_evaluation_of_two_is_stopped_and_goes_on(processes, short, tmp_path):
    """SIGTERM comes to the second process, amid the last of several attacks."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    for copy in (workdir, whole):
        shutil.copytree(short, copy)
    before = outcome(workdir)
    wanted = ["--attacks=fgsm,pgd100", "--batch_size=16", "--examples=240", "--save_examples"]
    module = "advmoe_jax.evaluate"
    processes.run(2, 2, [f"--workdir={whole}", *wanted], module)

    running = processes.start(2, 2, [f"--workdir={workdir}", *wanted], module)
    wait_for(lambda: [*workdir.glob("unfinished/pgd100-*.npz")], *running)
    running[1].send_signal(signal.SIGTERM)
    ends = [ended(process) for process in running]
    assert [code for code, _, _ in ends] == [0, 0]
    said = "stopped by SIGTERM; saved: the same command goes on"
    assert [out.count(said) for _, out, _ in ends] == [1, 0]
    assert outcome(workdir) == before  # no result of a part of what was asked for
    assert sorted(arrays(workdir, "examples")) == ["fgsm@240"]
    (state,) = workdir.glob("unfinished/pgd100-*.npz")
    with np.load(state) as kept:
        assert 0 < kept["batches"] < 240 / 16

    processes.run(2, 2, [f"--workdir={workdir}", *wanted], module)
    assert outcome(workdir) == outcome(whole) != before
    for folder in ("outcomes", "examples"):
        assert_equal_arrays(workdir, whole, folder)
    assert not (workdir / "unfinished").exists()


def test_two_in_a_bucket_equal_two_on_a_disk(processes, short, bucket):
    buckets = {"ADVMOE_BUCKETS": os.environ["ADVMOE_BUCKETS"]}
    for _ in range(2):  # the second time nothing is left to train
        processes.run(2, 2, [*flags(SHORT), f"--workdir={bucket}"], **buckets)
    assert outcome(bucket) == outcome(short)
    assert {path.name for path in (bucket / "checkpoints").iterdir()} == {"4"}
