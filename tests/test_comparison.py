"""A tiny comparison at library level: killed and continued, skipped, gathered; and its rows."""

import importlib.util
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import comparison, experiment, runs
from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import cost
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.models import registry
from advmoe_jax.reports import write_comparison
from advmoe_jax.training.checkpoint import Checkpointer
from advmoe_jax.training.loop import Diverged, Stopped

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("compare_*.py"))
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
def substitute(tiny_model, tmp_path_factory):
    """A context in which every network is the tiny one; what compiles is kept for all of them."""
    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }

    def create_model(config, *, in_channels, num_classes, rngs):
        return tiny_model(config.num_experts, num_classes)

    @contextmanager
    def context():
        before = {name: getattr(jax.config, name) for name in cache}
        for name, value in cache.items():
            jax.config.update(name, value)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "create_model", create_model)
            cost._traced.cache_clear()  # one config, two networks
            yield
            cost._traced.cache_clear()
        for name, value in before.items():
            jax.config.update(name, value)

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
        return config, root, comparison.compare(config, root, QUIET)


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
            config, results = config_lib.load(run / "config.json"), read_results(run)
            assert (config.seed, results["seed"]) == (seed, seed)
            assert results["steps"] == 6 and (run / "report.html").exists()
            # Closed: no optimizer's state is left, and nothing else is lost.
            assert experiment.is_closed(run) and not (run / "checkpoints").exists()
            with experiment.open_checkpoints(config, run) as checkpointer:
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
    # The figures are drawn elsewhere.
    monkeypatch.setattr(runs, "explanation_figures", lambda *given: {})
    monkeypatch.setattr(comparison, "write_report", lambda workdir: None)

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

        monkeypatch.setattr(module, name, dying)
        with pytest.raises(Killed):
            comparison.compare(config, tmp_path, QUIET)
        monkeypatch.setattr(module, name, original)

    # In the second epoch of a run; after a strong attack; before a run counts as finished.
    kill(runs.RunLog, "epoch", lambda log, entry, total: entry["epoch"] == 2)
    kill(experiment, "evaluate", lambda *a, attacks, **k: attacks == "fgsm")
    kill(runs, "explain", lambda run, workdir, *a, **k: "robust_experts" in str(workdir))
    again = fingerprint(comparison.compare(config, tmp_path, QUIET))
    assert again == {key: run for key, run in fingerprint(found).items() if key[1] == "0"}


@pytest.mark.slow
def test_what_is_finished_is_left_alone(whole, monkeypatch):
    config, root, found = whole
    for name in ("train", "explain"):
        monkeypatch.setattr(runs, name, pytest.fail)
    monkeypatch.setattr(experiment, "load_images", pytest.fail)
    assert comparison.compare(config, root, QUIET)["rows"] == found["rows"]


@pytest.mark.slow
def test_another_attack_costs_no_training(whole, tiny_networks, tmp_path, monkeypatch):
    config, root, found = whole
    root = shutil.copytree(root, tmp_path / "copy")  # of directories that may be moved, too
    more = one_seed(config)
    more.strong_attacks = "fgsm,router"
    monkeypatch.setattr(runs, "explanation_figures", lambda *given: {})
    asked = []
    evaluate = experiment.evaluate

    def spy(*arguments, attacks, **settings):
        asked.append(attacks)
        return evaluate(*arguments, attacks=attacks, **settings)

    monkeypatch.setattr(experiment, "evaluate", spy)
    again = comparison.compare(more, root, QUIET)
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

    monkeypatch.setattr(comparison, "_finish", finish)
    found = comparison.compare(config, tmp_path, QUIET)
    assert finished == ["at_dense"]
    assert found["rows"]["standard_moe"]["failed"] == {"0": "loss (nan) is not finite at step 3"}
    assert "Standard (MoE)" in found["rows"]["robust_router"]["failed"]["0"]


def test_sigterm_goes_through(tiny_networks, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise Stopped

    monkeypatch.setattr(runs, "train", stopped)
    with pytest.raises(Stopped):
        comparison.compare(small("at_dense"), tmp_path, QUIET)


def test_rows_differ_in_what_they_say_and_in_nothing_else(tmp_path):
    config = small(",".join(comparison.ROWS))
    config.run.seed, config.strong_attacks = 7, "router"
    for name, row in comparison.ROWS.items():
        run = comparison.run_config(config, name, 8, 0.375, tmp_path)
        changed = {
            value
            for value in config_lib.names()
            if config_lib.value(run, value) != config_lib.value(_listed(config.run), value)
        }
        ours = {k for k, v in row.changes.items() if v != config_lib.value(config.run, k)}
        hydra = {"model.keep"} if name == "at_sparse" else set()
        path = {row.path} if row.path else set()
        assert changed == {"seed", "evaluation.attacks"} | ours | hydra | path
        assert run.seed == 8
        attacks = "pgd2,router" if run.model.num_experts > 1 else "pgd2"
        assert run.evaluation.attacks == attacks
    assert comparison.run_config(config, "at_sparse", 8, 0.375, tmp_path).model.keep == 0.375
    start = comparison.run_config(config, "robust_router", 8, 0.375, tmp_path).start.run
    assert start == str(tmp_path / "standard_moe" / "seed8")


def _listed(config):
    """JSON has no tuples."""
    return ConfigDict(json.loads(config.to_json()))


def test_the_sparse_network_costs_what_the_mixture_does():
    config = shipped("compare_digits")
    images = experiment.load_images(config.run)
    keep = comparison._keep_of_equal_cost(config, images)
    macs = {}
    for name in ("at_sparse", "at_moe"):
        model = comparison.run_config(config, name, 0, keep, Path("x")).model
        macs[name] = comparison.network_cost(model, (8, 8, 1), 10)["macs"]["total"]
    assert 0.97 < macs["at_sparse"] / macs["at_moe"] <= 1


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_comparisons_are_complete(name):
    config = shipped(name)
    comparison.check(config)
    assert config.num_seeds >= 1 and config.attacks.startswith("pgd50")
    for row in comparison.row_names(config):
        comparison.run_config(config, row, 0, 0.5, Path("x"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": "at_dense,at_mow"}, "row 'at_mow' is unknown; choose from at_dense, "),
        ({"rows": " , "}, "names no row"),
        ({"rows": "at_sparse"}, "starts from the runs of 'at_dense': add it to rows"),
        ({"num_seeds": 0}, "num_seeds=0 must be at least 1"),
        ({"examples": -1}, "examples=-1 must not be negative"),
        ({"attacks": "pdg50"}, "attack 'pdg50' is unknown"),
        ({"attacks": "clean", "strong_attacks": ""}, "names no attack"),
        ({"explained_attack": "router"}, "needs a router"),
        ({"run": {"model": {"num_experts": 1}}}, "num_experts=2 or more"),
        ({"run": {"num_epochs": 0}}, "config.run.num_epochs=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(changes, said):
    config = small("at_dense")
    config.update(ConfigDict(changes))
    with pytest.raises(UserError, match=said):
        comparison.check(config)
