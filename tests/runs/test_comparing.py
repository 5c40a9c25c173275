"""A tiny comparison at library level: killed and continued, skipped, gathered."""

import importlib.util
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import storage
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.models.cnn import CNN
from advmoe_jax.reports import write_comparison
from advmoe_jax.runs import comparing, directory, training
from advmoe_jax.runs.comparing import compare
from advmoe_jax.training.checkpoint import Checkpointer
from advmoe_jax.training.loop import Diverged, Stopped

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = Console(quiet=True)


def shipped(name):
    if str(CONFIGS) not in sys.path:  # as the command does, for configs that import neighbours
        sys.path.append(str(CONFIGS))
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small(rows, num_seeds=2):
    """A comparison of networks that see a few batches."""
    config = shipped("compare_digits")
    run = config.run
    config.update(ConfigDict({"rows": rows, "num_seeds": num_seeds, "examples": 48}))
    config.update({"attacks": "pgd2", "strong_attacks": "fgsm", "strong_examples": 16})
    config.update({"explained_attack": "pgd2", "explained_examples": 40})
    run.update({"num_epochs": 2, "batch_size": 16, "num_devices": 1})
    run.data.update({"train_examples": 48})
    run.attack.update({"num_steps": 1})
    run.evaluation.update({"validation_steps": 1, "batch_size": 64})
    return config


@pytest.fixture(scope="module")
def substitute(tiny_model):
    """A context in which every network is the tiny one."""

    def create(self, *, in_channels, num_classes, rngs):
        return tiny_model(self.num_experts, num_classes)

    @contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CNN, "create", create)
            network_cost.cache_clear()  # one record, two networks
            yield
            network_cost.cache_clear()

    return context


@pytest.fixture
def tiny_networks(substitute):
    with substitute():
        yield


def one_seed(config):
    config = ConfigDict(json.loads(config.to_json()))
    config.num_seeds = 1
    return config


TWO_ROWS = "standard_moe,robust_experts"


@pytest.fixture(scope="module")
def whole(substitute, tmp_path_factory):
    """(config, directory, what was gathered) of a comparison that was never cut off."""
    config, root = small(TWO_ROWS), tmp_path_factory.mktemp("whole")
    with substitute():
        return config, root, compare(config, root, QUIET)


def fingerprint(found):
    """All that does not depend on the clock."""
    names = ("standard_accuracy", "robust_accuracy.pgd2", "robust_accuracy.fgsm", "agreement",
             "evaluated", "routing", "curve")  # fmt: skip
    return {
        (row, seed): {name: run[name] for name in names}
        for row, values in found["rows"].items()
        for seed, run in values["runs"].items()
    }


@pytest.mark.slow
def test_every_row_and_seed_is_a_run_of_its_own(whole):
    _, root, found = whole
    assert list(found["rows"]) == TWO_ROWS.split(",")
    for name in TWO_ROWS.split(","):
        for seed in (0, 1):
            run = root / name / f"seed{seed}"
            config, results = directory.read_config(run), read_results(run)
            assert (config.seed, results["seed"]) == (seed, seed)
            assert results["steps"] == 6 and (run / "report.html").exists()
            # Closed: no optimizer's state is left, and nothing else is lost.
            assert directory.is_closed(run) and not (run / "checkpoints").exists()
            with directory.open_checkpoints(config, run) as checkpointer:
                step, last = checkpointer.restore_latest(None)
                best = checkpointer.restore_best(None)[0]
            assert (step, best) == (6, results["evaluated"]["step"])
            assert {leaf.split("/")[1] for leaf in last} == {"params", "stats"}
            assert {k: v["examples"] for k, v in results["attacks"].items()} == {
                "clean": 48, "pgd2": 48, "fgsm": 16,
            }  # fmt: skip
            numbers = found["rows"][name]["runs"][str(seed)]
            assert numbers["standard_accuracy"] == results["standard_accuracy"]
            assert numbers["agreement"] == results["routing"]["agreement"]["pgd2"]
            assert numbers["robust_accuracy.fgsm"] == results["robust_accuracy"]["fgsm"]
            assert numbers["images_per_second"] > 0
    assert found["throughput"]["batch_size"] == 64
    weights = json.loads((root / "throughput.json").read_text())["weights"]
    assert {name: set(of_row) for name, of_row in weights.items()} == {
        name: {"0", "1"} for name in TWO_ROWS.split(",")
    }


@pytest.mark.slow
def test_the_dissection_keeps_the_other_half_of_the_standard_run(whole):
    root, halves = whole[1], {}
    for name in TWO_ROWS.split(","):
        with Checkpointer(root / name / "seed0" / "weights", 3) as checkpointer:
            restore = "restore_best" if name == "standard_moe" else "restore_latest"
            halves[name] = getattr(checkpointer, restore)(None)[1]
    standard, robust = halves["standard_moe"], halves["robust_experts"]
    parts = ("state/params/", "state/stats/")
    router = [x for x in standard if any(x.startswith(f"{part}router") for part in parts)]
    experts = [x for x in standard if x.startswith("state/params/experts")]
    assert router and all(np.array_equal(standard[x], robust[x]) for x in router)
    assert not all(np.array_equal(standard[x], robust[x]) for x in experts)


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_costs_no_bit(whole, tiny_networks, tmp_path, monkeypatch):
    config, _, found = whole
    config = one_seed(config)

    class Killed(BaseException):
        pass

    def kill(module, name, when):
        """Runs until a call of the function for which ``when`` is true has been done."""
        original = getattr(module, name)

        def dying(*arguments, **settings):
            result = original(*arguments, **settings)
            if when(*arguments, **settings):
                raise Killed
            return result

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, dying)
            compare(config, tmp_path, QUIET)

    # In the second epoch of a run; after a strong attack; before a run counts as finished.
    kill(training.RunLog, "epoch", lambda log, entry, total: entry["epoch"] == 2)
    kill(comparing, "evaluate", lambda *a: a[3].attacks == "fgsm")
    kill(comparing, "explain", lambda run, workdir, *a, **k: "robust_experts" in str(workdir))
    again = fingerprint(compare(config, tmp_path, QUIET))
    assert again == {key: run for key, run in fingerprint(found).items() if key[1] == "0"}


@pytest.mark.slow
def test_in_a_bucket_it_is_the_same(whole, tiny_networks, bucket):
    config, _, found = whole
    config = one_seed(config)
    again = compare(config, bucket, QUIET)
    assert fingerprint(again) == {k: run for k, run in fingerprint(found).items() if k[1] == "0"}
    run = bucket / "robust_experts" / "seed0"
    assert directory.is_closed(run) and not (run / "checkpoints").exists()
    write_comparison(bucket, {**again, "command": "compare"})
    assert (bucket / "report.html").is_file() and (bucket / "table.csv").is_file()
    before = storage.files_in(bucket)
    assert compare(config, bucket, QUIET)["rows"] == again["rows"]
    assert storage.files_in(bucket).keys() == before.keys()


@pytest.mark.slow
def test_what_is_finished_is_left_alone(whole):
    config, root, found = whole

    def written():
        return {path: path.stat().st_mtime_ns for path in root.glob("*/*/**/*") if path.is_file()}

    before = written()
    assert compare(config, root, QUIET)["rows"] == found["rows"]
    assert {path: at for path, at in written().items() if path.suffix != ".lock"} == {
        path: at for path, at in before.items() if path.suffix != ".lock"
    }


@pytest.mark.slow
def test_another_attack_costs_no_training(whole, tiny_networks, tmp_path, monkeypatch):
    config, root, found = whole
    root = shutil.copytree(root, tmp_path / "copy")  # of directories that may be moved, too
    more = one_seed(config)
    more.strong_attacks = "fgsm,router"
    asked = []
    evaluate = comparing.evaluate

    def spy(*arguments):
        asked.append(arguments[3].attacks)
        return evaluate(*arguments)

    monkeypatch.setattr(comparing, "evaluate", spy)
    again = compare(more, root, QUIET)
    assert asked == ["router", "pgd2"] * 2  # and nothing was trained, though runs are closed
    for name in TWO_ROWS.split(","):
        run, before = (x["rows"][name]["runs"]["0"] for x in (again, found))
        assert 0 <= run["robust_accuracy.router"] <= 1
        assert run["evaluated"] == before["evaluated"]
        assert run["robust_accuracy.fgsm"] == before["robust_accuracy.fgsm"]


@pytest.mark.slow
def test_its_files_hold_the_table(whole):
    _, root, found = whole
    report = write_comparison(root, found)
    page = report.read_text()
    assert "Robust experts only" in page and page.count("data:image/png;base64,") == 5
    assert "href" not in page and "<script" not in page
    assert json.loads((root / "results.json").read_text())["rows"] == found["rows"]
    text = (root / "table.md").read_text()
    mean = found["rows"]["standard_moe"]["estimates"]["standard_accuracy"]["mean"]
    assert f"| Standard (MoE) | {100 * mean:.1f} ±" in text
    assert "Difference" not in text  # there is no AT (Dense) to differ from


def test_a_run_that_diverges_is_told_and_the_others_go_on(tiny_networks, tmp_path, monkeypatch):
    config = small("at_dense,standard_moe,robust_router", num_seeds=1)
    finished = []

    def finish(config, name, run, *rest):
        if name == "standard_moe":
            raise Diverged("loss (nan) is not finite at step 3")
        finished.append(name)

    monkeypatch.setattr(comparing, "_finish", finish)
    found = compare(config, tmp_path, QUIET)
    assert finished == ["at_dense"]
    assert found["rows"]["standard_moe"]["failed"] == {"0": "loss (nan) is not finite at step 3"}
    assert "Standard (MoE)" in found["rows"]["robust_router"]["failed"]["0"]


def test_sigterm_goes_through(tiny_networks, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise Stopped

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(Stopped):
        compare(small("at_dense"), tmp_path, QUIET)
