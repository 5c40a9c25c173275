"""The evaluation command on a run whose two checkpoints were made by hand, not by training."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax import experiment
from advmoe_jax.models import registry, resnet
from advmoe_jax.training.checkpoint import Checkpointer, tree_sha256

REPOSITORY = Path(__file__).parents[1]
ONE_BLOCK = """
import runpy, sys
from functools import partial
from advmoe_jax.models import registry, resnet
resnet.DEPTHS[4] = resnet.Stages((1,), bottleneck=False)
ten = registry.BACKBONES["resnet10_cifar"]
registry.BACKBONES["resnet4_cifar"] = partial(ten.func, 4, *ten.args[1:])
runpy.run_module("advmoe_jax.evaluate", run_name="__main__", alter_sys=True)
"""
BEST, LAST = 3, 5


def create_config(num_experts):
    scope = {}
    exec((REPOSITORY / "configs" / "digits.py").read_text(), scope)
    config = scope["get_config"]()
    changes = {
        "num_devices": 1,
        "model": {"name": "resnet4_cifar", "width": 4, "num_experts": num_experts},
        "evaluation": {"attacks": "pgd1", "batch_size": 64},
    }
    config.update(ConfigDict(changes))
    config.model.router.update(ConfigDict({"width": 4, "blocks": 1}))
    return config


class Run:
    """A directory with two checkpoints: the best one routes to both experts, the last to one."""

    def __init__(self, workdir, num_experts):
        self.workdir, config = workdir, create_config(num_experts)
        workdir.mkdir()
        config_lib.save(config, workdir / "config.json")
        self.images = experiment.load_images(config)
        key = experiment.keys(config.seed).init
        self.network, params, stats = experiment.create_network(config, self.images, key)
        self.trees = {
            step: ({**params, "router": self.router(params, scale)}, stats)
            for step, scale in ((BEST, 1000.0), (LAST, 0.0))
        }
        with Checkpointer(workdir / "checkpoints", 3) as checkpointer:
            for (step, (params, stats)), metric in zip(
                self.trees.items(), (0.5, 0.25), strict=True
            ):
                state = {"state": {"params": params, "stats": stats, "step": jnp.int32(step)}}
                checkpointer.save(step, state, metric)

    def router(self, params, scale):
        """The router with another head; scaled by zero it finds all experts alike."""
        if not params["router"]:
            return {}
        kernel = scale * params["router"]["head"]["kernel"]
        kernel -= jnp.mean(kernel, axis=1, keepdims=True)
        return {**params["router"], "head": {**params["router"]["head"], "kernel": kernel}}

    def accuracy(self, step, split):
        """The standard accuracy, without the evaluation's machinery."""
        params, stats = self.trees[step]
        images = jnp.asarray(split.images, jnp.float32) / 255
        logits = jax.jit(lambda x: self.network.apply(params, stats, x)[0].logits)(images)
        return float(np.mean(np.argmax(logits, axis=1) == split.labels))

    def results(self):
        return json.loads((self.workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def one_block():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, 4, resnet.Stages((1,), bottleneck=False))
        ten = registry.BACKBONES["resnet10_cifar"]
        patch.setitem(registry.BACKBONES, "resnet4_cifar", partial(ten.func, 4, *ten.args[1:]))
        yield


@pytest.fixture(scope="module")
def moe(one_block, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("evaluate") / "moe", 2)


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """(run, arguments) -> what was printed, of a command that must end well."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def command(run, *arguments):
        process = subprocess.run(
            [sys.executable, "-c", ONE_BLOCK, f"--workdir={run.workdir}", *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (process.returncode, process.stderr) == (0, "")
        return process.stdout

    return command


@pytest.fixture(scope="module")
def evaluations(moe, evaluate):
    """What was printed and what the results held, of three evaluations of one run."""
    found = []
    for arguments in (
        [],
        ["--attacks=fgsm,router", "--examples=40"],
        ["--attacks=clean", "--checkpoint=last"],
    ):
        out = evaluate(moe, *arguments)
        found.append((out, moe.results()))
    return found


@pytest.mark.slow
def test_the_best_checkpoint_and_the_attacks_of_the_config(moe, evaluations):
    out, results = evaluations[0]
    last, best = tree_sha256(moe.trees[LAST]), tree_sha256(moe.trees[BEST])
    evaluated = {"checkpoint": "best", "step": BEST, "params_sha256": best}
    assert results["evaluated"] == evaluated
    assert (results["params_sha256"], results["steps"]) == (last, LAST)
    assert results["attacks"].keys() == {"clean", "pgd1"}
    assert results["attacks"]["pgd1"]["examples"] == 360
    assert results["standard_accuracy"] == pytest.approx(moe.accuracy(BEST, moe.images.test))
    assert min(results["routing"]["load"]) > 0.01 and results["warnings"] == []
    assert results["device"].startswith("1 x ")  # the run's, of two that there are
    assert "pgd1" in out and f"results in {moe.workdir / 'results.json'}" in out
    assert (moe.workdir / "report.html").exists() and "warning" not in out


def test_other_attacks_join_the_ones_before_and_note_their_examples(moe, evaluations):
    (_, before), (out, results) = evaluations[:2]
    assert results["robust_accuracy"].keys() == {"pgd1", "fgsm", "router"}
    assert results["robust_accuracy"]["pgd1"] == before["robust_accuracy"]["pgd1"]
    assert results["attacks"]["pgd1"] == before["attacks"]["pgd1"]
    agreement = results["routing"]["agreement"]
    assert agreement.keys() == {"pgd1", "fgsm", "router"}
    assert agreement["pgd1"] == before["routing"]["agreement"]["pgd1"]
    assert agreement["router"] < 1  # it is the router that is attacked
    for name in ("clean", "fgsm", "router"):
        assert results["attacks"][name]["examples"] == 40
    for share in results["robust_accuracy"].values():
        assert 0 <= share <= 1
    fewer = experiment.subset(moe.images.test, 40)
    assert len(fewer.labels) == 40
    assert results["standard_accuracy"] == pytest.approx(moe.accuracy(BEST, fewer))
    assert "fgsm" in out and "pgd1" in out


def test_the_last_checkpoint_if_asked_for(moe, evaluations):
    out, results = evaluations[2]
    last = tree_sha256(moe.trees[LAST])
    assert results["evaluated"] == {"checkpoint": "last", "step": LAST, "params_sha256": last}
    assert results["standard_accuracy"] == pytest.approx(moe.accuracy(LAST, moe.images.test))
    assert results["robust_accuracy"] == {}  # the earlier ones were of other parameters
    assert results["routing"]["load"] == [1.0, 0.0]
    (warning,) = results["warnings"]
    assert warning.startswith("expert 1 got 0.00% of the images of the test split: the router has")
    assert "warning" in out and "expert 1 got 0.00%" in out


def test_a_dense_network(one_block, evaluate, tmp_path):
    run = Run(tmp_path / "dense", 1)
    out = evaluate(run, "--attacks=fgsm", "--examples=30")
    results = run.results()
    assert results["routing"] is None and results["warnings"] == []
    assert results["robust_accuracy"].keys() == {"fgsm"}
    fewer = experiment.subset(run.images.test, 30)
    assert results["standard_accuracy"] == pytest.approx(run.accuracy(BEST, fewer))
    assert "load" not in out and "agree" not in out
