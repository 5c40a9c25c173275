"""The evaluation command on a run whose two checkpoints were made by hand, not by training."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

import compiling
import one_block
from advmoe_jax import config as config_lib
from advmoe_jax.files import StateFile
from advmoe_jax.runs import build
from advmoe_jax.runs.evaluating import Asked, evaluate
from advmoe_jax.training.checkpoint import Checkpointer, tree_sha256

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # what all of them look at takes most of a minute
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
        self.images = build.load_images(config)
        self.network, params, stats = build.create_network(config, self.images)
        self.trees = {
            step: ({**params, **self.router(params, scale)}, stats)
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
        if "router" not in params:
            return {}
        router = params["router"]
        kernel = scale * router["head"]["kernel"]
        kernel -= jnp.mean(kernel, axis=1, keepdims=True)
        return {"router": {**router, "head": {**router["head"], "kernel": kernel}}}

    def accuracy(self, step, split):
        """The standard accuracy, without the evaluation's machinery."""
        params, stats = self.trees[step]
        images = jnp.asarray(split.images, jnp.float32) / 255
        logits = jax.jit(lambda x: self.network.apply(params, stats, x)[0].logits)(images)
        return float(np.mean(np.argmax(logits, axis=1) == split.labels))

    def results(self):
        return json.loads((self.workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def network():
    with pytest.MonkeyPatch.context() as patch:
        one_block.add(patch.setitem)
        yield


@pytest.fixture(scope="module")
def moe(network, tmp_path_factory):
    return Run(tmp_path_factory.mktemp("evaluate") / "moe", 2)


@pytest.fixture(scope="module")
def command():
    """(run, arguments) -> what was printed, of a command that must end well."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": compiling.flags(2),
    }

    def start(run, *arguments):
        process = subprocess.run(
            [
                sys.executable,
                str(one_block.SCRIPT),
                "advmoe_jax.evaluate",
                f"--workdir={run.workdir}",
                *arguments,
            ],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (process.returncode, process.stderr) == (0, "")
        return process.stdout

    return start


@pytest.fixture(scope="module")
def evaluations(moe, command, tmp_path_factory):
    """What was printed and what the results held, of three evaluations of one run."""
    elsewhere = tmp_path_factory.mktemp("last")
    found = []
    for place, arguments in (
        (moe.workdir, []),
        (moe.workdir, ["--attacks=fgsm,router", "--examples=40"]),
        (elsewhere, ["--attacks=clean", "--checkpoint=last", f"--out={elsewhere}"]),
    ):
        out = command(moe, *arguments)
        found.append((out, json.loads((place / "results.json").read_text())))
    return found


def test_the_best_checkpoint_and_the_attacks_of_the_config(moe, evaluations):
    out, results = evaluations[0]
    last, best = tree_sha256(moe.trees[LAST]), tree_sha256(moe.trees[BEST])
    evaluated = {"checkpoint": "best", "step": BEST, "params_sha256": best}
    assert results["evaluated"] == evaluated
    assert (results["params_sha256"], results["steps"]) == (last, LAST)
    assert results["attacks"].keys() == {"clean", "pgd1"}
    assert results["attacks"]["pgd1"]["examples"] == 360
    assert results["standard_accuracy"] == pytest.approx(moe.accuracy(BEST, moe.images.test))
    assert min(results["routing"]["load"]) > 0.01
    (warning,) = results["warnings"]
    assert warning.startswith("pgd1: 1 steps of 0.02 reach 0.02 of epsilon=0.2: ")
    assert results["device"].startswith("1 x ")  # the run's, of two that there are
    assert "pgd1" in out and f"results in {moe.workdir / 'results.json'}" in out
    assert (moe.workdir / "report.html").exists() and warning[:30] in out


def test_other_attacks_join_the_ones_before_and_note_their_examples(moe, evaluations):
    (_, before), (out, results) = evaluations[:2]
    assert results["robust_accuracy"].keys() == {"pgd1", "fgsm", "router"}
    assert results["robust_accuracy"]["pgd1"] == before["robust_accuracy"]["pgd1"]
    assert results["attacks"]["pgd1"] == before["attacks"]["pgd1"]
    agreement = results["routing"]["agreement"]
    assert agreement.keys() == {"pgd1", "fgsm", "router"}
    assert agreement["pgd1"] == before["routing"]["agreement"]["pgd1"]
    assert agreement["router"] < 1  # it is the router that is attacked
    for name in ("clean@40", "fgsm", "router"):
        assert results["attacks"][name]["examples"] == 40
    for share in results["robust_accuracy"].values():
        assert 0 <= share <= 1
    fewer = build.subset(moe.images.test, 40)
    assert len(fewer.labels) == 40
    on_fewer = results["standard_accuracy_on_fewer"]
    assert on_fewer == {"clean@40": pytest.approx(moe.accuracy(BEST, fewer))}
    # What is known of more images stays.
    assert results["standard_accuracy"] == before["standard_accuracy"]
    assert results["attacks"]["clean"]["examples"] == 360
    assert len(contents(moe.workdir / "outcomes" / "clean@40.npz")["labels"]) == 40
    assert "fgsm" in out and "pgd1" in out and "360 images" in out


def test_the_last_checkpoint_if_asked_for(moe, evaluations):
    out, results = evaluations[2]
    last = tree_sha256(moe.trees[LAST])
    assert results["evaluated"] == {"checkpoint": "last", "step": LAST, "params_sha256": last}
    assert results["standard_accuracy"] == pytest.approx(moe.accuracy(LAST, moe.images.test))
    assert results["robust_accuracy"] == {}  # the earlier ones are of other parameters
    assert moe.results() == evaluations[1][1]
    assert results["routing"]["load"] == [1.0, 0.0]
    (warning,) = results["warnings"]
    assert warning.startswith("expert 1 got 0.00% of the images of the test split: the router has")
    assert "warning" in out and "expert 1 got 0.00%" in out


def test_a_dense_network(network, command, tmp_path):
    run = Run(tmp_path / "dense", 1)
    out = command(run, "--attacks=fgsm", "--examples=30")
    results = run.results()
    assert results["routing"] is None and results["warnings"] == []
    assert results["robust_accuracy"].keys() == {"fgsm"}
    fewer = build.subset(run.images.test, 30)
    assert results["standard_accuracy"] == pytest.approx(run.accuracy(BEST, fewer))
    assert "load" not in out and "agree" not in out


# ------------------------------------------------------------------------- attacks that take long

EXAMPLES = 24


@pytest.fixture(scope="module")
def easy(moe):
    """The images with labels that the network, which nobody trained, gets right but for a few."""
    params, stats = moe.trees[BEST]
    test = moe.images.test
    pixels = jnp.asarray(test.images, jnp.float32) / 255
    logits = jax.jit(lambda x: moe.network.apply(params, stats, x)[0].logits)(pixels)
    labels = np.array(jnp.argmax(logits, axis=1), np.int32)
    labels[::9] = (labels[::9] + 1) % 10
    return moe.images._replace(test=test._replace(labels=labels))


def evaluate_here(run, images, workdir, attacks, **settings):
    """The evaluation itself, without a new process, in a directory of its own."""
    if not workdir.exists():
        others = shutil.ignore_patterns("results.json", "report.html", "outcomes", ".jax_cache")
        shutil.copytree(run.workdir, workdir, ignore=others)
    config = config_lib.load(workdir / "config.json")
    asked = Asked(attacks, **{"examples": EXAMPLES} | settings)
    return evaluate(config, workdir, images, asked, Console(quiet=True))


def contents(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def plain_predictions(run, images):
    """By a forward pass outside of jit."""
    params, stats = run.trees[BEST]
    with jax.disable_jit():
        logits = run.network.apply(params, stats, jnp.asarray(images))[0].logits
    return np.argmax(logits, axis=1)


@pytest.fixture(scope="module")
def attacked(moe, easy, tmp_path_factory):
    """The directory and the results of an evaluation by PGD and by the suite."""
    workdir = tmp_path_factory.mktemp("attacked") / "run"
    found = evaluate_here(moe, easy, workdir, "pgd3,moe2", save_examples=True)
    return workdir, found


def test_results_of_the_suite(attacked):
    workdir, found = attacked
    assert found == json.loads((workdir / "results.json").read_text())
    assert not (workdir / "unfinished").exists()
    accuracy = found["robust_accuracy"]
    assert list(accuracy) == ["pgd3", "moe2", "moe_network2"]
    assert accuracy["moe2"] <= accuracy["moe_network2"] < found["standard_accuracy"] < 1
    ball = {"norm": "linf", "epsilon": 0.2, "examples": EXAMPLES, "seed": 0, "num_steps": 2}
    assert ball.items() <= found["attacks"]["moe2"].items()
    parts = found["attacks"]["moe2"]["parts"]
    names = ["route", "joint", "straight_through", "softmax_gate", "frozen_route", "worst_pathway"]
    assert list(parts) == names
    assert parts["worst_pathway"]["robust_accuracy"] == pytest.approx(accuracy["moe2"])
    assert found["attacks"]["moe2"]["judge"] == "the network, then each pathway held fixed"
    assert found["attacks"]["moe_network2"]["judge"] == "the network"
    assert found["routing"]["agreement"].keys() == accuracy.keys()


@pytest.mark.parametrize("name", ["pgd3", "moe2"])
def test_another_tool_can_check_the_images(moe, easy, attacked, name):
    """By NumPy and a plain forward pass, from the files and the data alone."""
    workdir, found = attacked
    saved = contents(workdir / "examples" / f"{name}.npz")
    indices = saved["indices"]
    assert len(np.unique(indices)) == EXAMPLES and indices.max() < len(easy.test.labels)
    clean = easy.test.images[indices].astype(np.float64) / 255
    assert saved["images"].dtype == np.float32 and saved["images"].shape == clean.shape
    assert saved["attack"] == name and saved["norm"] == "linf" and saved["epsilon"] == 0.2
    assert np.abs(saved["images"] - clean).max() <= 0.2 + 1e-6
    assert saved["images"].min() >= 0 and saved["images"].max() <= 1
    np.testing.assert_array_equal(saved["labels"], easy.test.labels[indices])
    predictions = plain_predictions(moe, saved["images"])
    np.testing.assert_array_equal(predictions, saved["predictions"])
    right = np.mean(predictions == saved["labels"])
    by_network = name.replace("moe", "moe_network")
    assert right == pytest.approx(found["robust_accuracy"][by_network])


def test_the_outcome_of_every_image_is_kept(moe, attacked):
    workdir, found = attacked
    sha = found["evaluated"]["params_sha256"]
    for name, accuracy in (
        found["robust_accuracy"] | {"clean": found["standard_accuracy"]}
    ).items():
        kept = contents(workdir / "outcomes" / f"{name}.npz")
        assert kept["correct"].mean() == pytest.approx(accuracy) and kept["params_sha256"] == sha
        assert kept["choices"].shape == (EXAMPLES, 1, 1) and kept["indices"].shape == (EXAMPLES,)
        if "fooled_by" in kept:
            np.testing.assert_array_equal(kept["fooled_by"] == "", kept["correct"])
        if not name.startswith("moe"):  # whose pathways have a say, too
            np.testing.assert_array_equal(kept["predictions"] == kept["labels"], kept["correct"])
    by = contents(workdir / "outcomes" / "moe2.npz")["fooled_by"]
    assert set(by) <= {"", "clean", *found["attacks"]["moe2"]["parts"]}


def test_another_threat_model_stands_beside_the_config_s(moe, easy, attacked):
    workdir, before = attacked
    settings = {"norm": "l2", "epsilon": "1/2", "batch_size": 10, "save_examples": True}
    found = evaluate_here(moe, easy, workdir, "pgd3", **settings)
    assert found["robust_accuracy"].keys() == before["robust_accuracy"].keys() | {"pgd3@l2-0.5"}
    assert found["attacks"]["pgd3"] == before["attacks"]["pgd3"]
    other = found["attacks"]["pgd3@l2-0.5"]
    assert (other["norm"], other["epsilon"], other["step_size"]) == ("l2", 0.5, 0.05)
    saved = contents(workdir / "examples" / "pgd3@l2-0.5.npz")
    clean = easy.test.images[saved["indices"]].astype(np.float64) / 255
    far = np.sqrt(np.sum((saved["images"] - clean) ** 2, axis=(1, 2, 3)))
    assert 0.3 < far.max() <= 0.5 * (1 + 1e-5)


def test_killed_and_resumed(moe, easy, tmp_path, monkeypatch):
    """In the first attack, then in the second."""
    names, settings = ("pgd2", "square30"), {"save_examples": True, "batch_size": 12}
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    expected = evaluate_here(moe, easy, whole, ",".join(names), **settings)
    real = StateFile.save
    # clean and pgd2 are saved twice each; then square30 after every call of the device.
    for saves, state in ((3, "pgd2"), (3, "square30")):
        numbers = itertools.count(1)

        def save(*given, numbers=numbers, saves=saves):
            real(*given)
            if next(numbers) == saves:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StateFile, "save", save)
            evaluate_here(moe, easy, workdir, ",".join(names), **settings)
        assert list((workdir / "unfinished").glob(f"{state}-*.npz"))
        assert not (workdir / "results.json").exists()
    found = evaluate_here(moe, easy, workdir, ",".join(names), **settings)
    accuracy = found["robust_accuracy"]
    assert accuracy == expected["robust_accuracy"]
    (part,) = found["attacks"]["square30"]["parts"].values()
    fallen = found["standard_accuracy"] - accuracy["square30"]
    assert part["fooled"] / EXAMPLES == pytest.approx(fallen)
    for name in names:
        one, other = (contents(w / "examples" / f"{name}.npz") for w in (workdir, whole))
        np.testing.assert_array_equal(one["images"], other["images"])
    assert not (workdir / "unfinished").exists()


def test_what_is_written_elsewhere_leaves_the_run_as_it_is(moe, command, tmp_path):
    def contents():
        files = sorted(x for x in moe.workdir.rglob("*") if x.is_file())
        return {str(x): x.read_bytes() for x in files}

    before, out = contents(), tmp_path / "elsewhere"
    said = command(moe, "--attacks=fgsm", "--examples=20", f"--out={out}", "--save_examples")
    assert contents() == before and str(out / "report.html") in said
    assert json.loads((out / "results.json").read_text())["attacks"]["fgsm"]["examples"] == 20
    assert "<h1>" in (out / "report.html").read_text()
    for name in ("outcomes/fgsm.npz", "outcomes/clean.npz", "examples/fgsm.npz"):
        assert (out / name).is_file()
