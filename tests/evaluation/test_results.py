"""results.json: what is measured, what is kept of earlier evaluations, and where it comes from."""

import json
import subprocess

import jax
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import results
from advmoe_jax.evaluation.accuracy import Outcome


def outcome(correct, choices=(0, 0, 1, 1), seconds=2.0):
    correct = np.array(correct, bool)
    if choices is None:
        return Outcome(correct, correct.astype(int), None, None, seconds)
    choices = np.array(choices, np.int32)[:, None, None]
    return Outcome(correct, correct.astype(int), choices, np.full((len(choices), 1), 0.5), seconds)


def measured(num_experts=2, **outcomes):
    settings = {name: {"examples": 4, "seed": 0} for name in outcomes}
    return results.measured(outcomes, settings, num_experts)


def test_what_is_measured():
    found = measured(
        clean=outcome([1, 1, 1, 0]), pgd2=outcome([1, 0, 0, 0], (0, 1, 1, 0), seconds=0.5)
    )
    assert found == {
        "standard_accuracy": 0.75,
        "robust_accuracy": {"pgd2": 0.25},
        "attacks": {
            "clean": {"examples": 4, "seed": 0},
            "pgd2": {"examples": 4, "seed": 0},
        },
        "routing": {"load": [0.5, 0.5], "entropy": 0.5, "agreement": {"pgd2": 0.5}},
        "images_per_second": {"clean": 2.0, "pgd2": 8.0},
    }
    json.dumps(found)


def test_a_dense_network_has_no_routing():
    found = measured(1, clean=outcome([1, 0], None), pgd2=outcome([0, 0], None))
    assert found["routing"] is None and found["robust_accuracy"] == {"pgd2": 0.0}


def with_parameters(found, sha256):
    return {**found, "evaluated": {"checkpoint": "best", "step": 3, "params_sha256": sha256}}


@pytest.mark.parametrize("choices", [(0, 0, 1, 1), None])
def test_attacks_measured_before_on_the_same_parameters_are_kept(choices):
    old = with_parameters(
        measured(
            clean=outcome([0, 0, 0, 0], choices),
            pgd2=outcome([1, 0, 0, 0], choices),
            fgsm=outcome([1, 1, 0, 0], choices),
        ),
        "a",
    )
    new = with_parameters(
        measured(clean=outcome([1, 1, 1, 0], choices), pgd2=outcome([0, 0, 0, 0], choices)), "a"
    )
    merged = results.merge(old, new)
    assert merged["standard_accuracy"] == 0.75
    assert merged["robust_accuracy"] == {"pgd2": 0.0, "fgsm": 0.5}
    assert (
        merged["attacks"].keys() == merged["images_per_second"].keys() == {"clean", "pgd2", "fgsm"}
    )
    if choices is None:
        assert merged["routing"] is None
    else:
        assert merged["routing"]["agreement"] == {"pgd2": 1.0, "fgsm": 1.0}


def measured_on(count, accuracies, num_experts=2):
    """The first ``count`` images, of which so many of each attack's are classified correctly."""
    choices = (0, 1, 0, 1)[:count]
    outcomes = {
        name: outcome([i < correct for i in range(count)], choices)
        for name, correct in accuracies.items()
    }
    settings = {name: {"examples": count} for name in outcomes}
    return with_parameters(results.measured(outcomes, settings, num_experts), "a")


def test_fewer_images_never_replace_more():
    full = measured_on(4, {"clean": 3, "pgd2": 1})
    quick = measured_on(2, {"clean": 2, "pgd2": 2, "fgsm": 1})
    both = results.merge(full, quick)
    assert both["standard_accuracy"] == 0.75
    assert both["standard_accuracy_on_fewer"] == {"clean@2": 1.0}
    # Nothing fuller is known of FGSM.
    assert both["robust_accuracy"] == {"pgd2": 0.25, "pgd2@2": 1.0, "fgsm": 0.5}
    counts = {name: settings["examples"] for name, settings in both["attacks"].items()}
    assert counts == {"clean": 4, "pgd2": 4, "clean@2": 2, "pgd2@2": 2, "fgsm": 2}
    assert both["routing"]["load"] == full["routing"]["load"]
    assert both["routing"]["agreement"].keys() == {"pgd2", "pgd2@2", "fgsm"}
    assert results.name_of_count(both, "pgd2", 2) == "pgd2@2"
    assert results.name_of_count(both, "fgsm", 2) == "fgsm"
    assert results.name_of_count(both, "pgd2", 0) == "pgd2"
    again = results.merge(both, measured_on(4, {"clean": 2, "fgsm": 0}))
    assert again["standard_accuracy"] == 0.5 and again["robust_accuracy"]["fgsm"] == 0.0
    assert again["robust_accuracy"]["pgd2@2"] == 1.0
    json.dumps(again)


def test_more_images_replace_fewer():
    quick, full = measured_on(2, {"clean": 2, "pgd2": 2}), measured_on(4, {"clean": 3, "pgd2": 1})
    assert results.merge(quick, full) == full


def test_attacks_on_other_parameters_are_not():
    old = with_parameters(measured(clean=outcome([0] * 4), fgsm=outcome([1] * 4)), "a")
    new = with_parameters(measured(clean=outcome([1] * 4), pgd2=outcome([0] * 4)), "b")
    assert results.merge(old, new) == new
    assert results.merge(None, new) == new


def named(found, checkpoint, **changes):
    return {**found, "evaluated": {**found["evaluated"], "checkpoint": checkpoint, **changes}}


def test_the_same_parameters_under_another_name_are_the_same(tmp_path):
    old = measured_on(4, {"clean": 3, "pgd2": 1}) | {"params_sha256": "a"}
    new = named(measured_on(2, {"clean": 2, "fgsm": 1}), "last", step=9)
    results.check_nothing_is_lost(tmp_path, old, new["evaluated"], "a")
    merged = results.merge(old, new)
    assert merged["robust_accuracy"] == {"pgd2": 0.25, "fgsm": 0.5}
    assert merged["evaluated"] == old["evaluated"] and merged["standard_accuracy"] == 0.75


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "last", "params_sha256": "b"}, "with the best checkpoint, which would be"),
        ({"thresholds": [0.5]}, "with other thresholds, which would be lost: give .* --out=OTHER"),
    ],
)
def test_results_of_other_weights_of_the_same_training_are_not_replaced(tmp_path, changes, said):
    old = measured_on(4, {"clean": 3, "pgd2": 1}) | {"params_sha256": "b"}
    evaluated = old["evaluated"] | changes
    with pytest.raises(UserError, match=said):
        results.check_nothing_is_lost(tmp_path / "results.json", old, evaluated, "b")
    # Trained on since: what was measured is of the past.
    results.check_nothing_is_lost(tmp_path / "results.json", old, evaluated, "c")
    results.check_nothing_is_lost(tmp_path / "results.json", None, evaluated, "b")


def test_thresholds_of_another_device_are_the_same_up_to_rounding(tmp_path):
    old = measured_on(4, {"clean": 3, "pgd2": 1}) | {"params_sha256": "a"}
    old["evaluated"] = old["evaluated"] | {"thresholds": [0.5, -1.0]}
    new = named(measured_on(4, {"clean": 3}), "best", thresholds=[0.5 + 1e-6, -1.0])
    results.check_nothing_is_lost(tmp_path, old, new["evaluated"], "a")
    assert results.merge(old, new)["robust_accuracy"] == {"pgd2": 0.25}


def test_attacks_that_are_kept_say_where_they_were_measured():
    old = measured_on(4, {"clean": 3, "pgd2": 1}) | {"device": "8 x tpu", "git_commit": "old"}
    new = measured_on(4, {"clean": 3, "fgsm": 1}) | {"device": "1 x cpu", "git_commit": "new"}
    attacks = results.merge(old, new)["attacks"]
    assert attacks["pgd2"] == {"device": "8 x tpu", "git_commit": "old", "examples": 4}
    assert attacks["fgsm"] == attacks["clean"] == {"examples": 4}
    third = results.merge(results.merge(old, new), {**new, "device": "gpu"})["attacks"]
    assert third["pgd2"]["device"] == "8 x tpu"


def test_warnings_of_attacks_keep_their_names():
    attacks = {"clean": {}, "pgd2": {"warnings": []}, "square": {"warnings": ["masked", "odd"]}}
    assert results.attack_warnings(attacks) == ["square: masked", "square: odd"]


def test_writing_and_reading(tmp_path):
    assert results.read_results(tmp_path) is None
    path = results.write_results(tmp_path, {"a": 1})
    assert path == tmp_path / "results.json"
    assert results.read_results(tmp_path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    results.write_results(tmp_path, {"a": 1})
    (tmp_path / "results.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        results.write_results(tmp_path, {"a": 2})
    assert results.read_results(tmp_path) == {"a": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b"null",
        b'{"a": ' * 100_000,
        b'{"attacks": 3}',
        b'{"attacks": {"clean": 3}}',
        b'{"robust_accuracy": {"pgd2": "low"}}',
        b'{"standard_accuracy": NaN}',
        b'{"routing": [1]}',
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path / 'results.json'} is damaged"):
        results.read_results(tmp_path)


def test_provenance():
    found = results.provenance(3)
    assert found.keys() == {"device", "versions", "git_commit"}
    assert found["device"].startswith(f"3 x {jax.devices()[0].device_kind}")
    assert found["versions"].keys() == {"python", *results.PACKAGES}
    assert found["versions"]["jax"] == jax.__version__


def checkout(path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=x")
    return git("rev-parse", "HEAD")


def test_the_commit_of_the_source_tree(tmp_path):
    (tmp_path / "module.py").touch()
    assert results.git_commit(tmp_path) is None
    commit = checkout(tmp_path)
    assert results.git_commit(tmp_path) == commit
    (tmp_path / "untracked.py").touch()
    assert results.git_commit(tmp_path) == commit
    (tmp_path / "module.py").write_text("changed")
    assert results.git_commit(tmp_path) == f"{commit}-dirty"


def test_an_installed_package_inside_another_checkout_has_no_commit(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "module.py").touch()
    checkout(tmp_path)
    assert results.git_commit(tmp_path / "venv") is None
