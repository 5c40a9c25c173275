"""A run whose images leave early: thresholds from validation images, and what results say."""

import json

import numpy as np
import pytest
from rich.console import Console

from advmoe_jax import defaults
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.evaluation.exits import sweep
from advmoe_jax.evaluation.thresholds import exits_taken
from advmoe_jax.runs import build, directory, training
from advmoe_jax.runs.evaluating import Asked, _check_place, evaluate
from advmoe_jax.runs.leaving import check_rule

QUIET = Console(quiet=True)


def small():
    """A narrow ResNet-10 with two side exits that sees a few batches of the digits."""
    config = defaults.cnn()
    config.update({"method": "multi_exit", "num_epochs": 1, "batch_size": 16, "num_devices": 1})
    config.model.update({"name": "resnet10_cifar", "num_experts": 1, "ratio": 1.0, "width": 4})
    config.model.update({"exits": (1, 2), "mean": (0.5,), "std": (0.25,)})
    config.data.update({"source": "digits", "train_examples": 48, "flip": False})
    config.data.crop_padding = 0
    config.attack.update({"epsilon": 0.2, "num_steps": 1, "step_size": 0.1})
    config.evaluation.update({"attacks": "clean,average2", "validation_steps": 1})
    config.evaluation.batch_size = 120
    return config


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("given:0.5", "1 values; given needs 2"),
        ("given:0.5,0.5,0.5", "3 values; given needs 2"),
        ("often", "no rule"),
        ("accuracy:0.005:foo", "attack 'foo' is unknown"),
        ("accuracy:0.005:exit9", "side exit 9; the network has 2"),
        ("accuracy:0.005:autoattack", "thresholds cannot be chosen under 'autoattack'; name an"),
        ("accuracy:0.005:slow_down", "thresholds cannot be chosen under 'slow_down'; name an"),
    ],
)
def test_a_wrong_rule_is_refused_before_anything_is_loaded(rule, words):
    config = small()
    with pytest.raises(UserError, match=words):
        check_rule(config, rule)
    config.evaluation.thresholds = rule
    with pytest.raises(UserError, match=words):
        check_rule(config)


def test_exits_that_an_attack_is_on_must_be_there():
    config = small()
    config.evaluation.attacks = "exit3"
    with pytest.raises(UserError, match="side exit 3; the network has 2"):
        build.settled(config, typed=True)
    config.evaluation.attacks = "exit_joint"
    with pytest.raises(UserError, match="on a router; the network has none"):
        build.settled(config, typed=True)
    config.model.exits = ()
    assert check_rule(config) is None
    with pytest.raises(UserError, match="no side exits"):
        check_rule(config, "quota")
    config.model.exits = (1, 4)
    with pytest.raises(UserError, match="blocks 1 to 3"):
        build.settled(config, typed=True)


@pytest.mark.slow
def test_a_run_from_training_to_results(tmp_path):
    config = small()
    images = build.load_images(config)
    workdir = directory.create(str(tmp_path / "run"))
    directory.claim(workdir, config)
    training.train(config, workdir, images, QUIET)

    def measured(attacks, place="run", **more):
        out = directory.create(str(tmp_path / place))
        return evaluate(config, workdir, images, Asked(attacks, **more), QUIET, out)

    found = measured("average2,exit1_2,slow_down2")
    exits, under = found["exits"], found["exits"]["under"]
    count = len(images.validation.labels)
    assert exits["rule"] == "quota" and exits["chosen_on"] == f"{count} validation images"
    assert set(under) == {"clean", "average2", "exit1_2", "slow_down2"}
    for told in under.values():
        assert sum(told["share"]) == pytest.approx(1) and len(told["accuracy"]) == 3
        macs = np.array(told["share"]) @ exits["costs"]["every"]
        assert told["macs"]["every"] == pytest.approx(macs)
        assert told["macs"]["own"] <= told["macs"]["every"]
        first, *_, last = (point[0] for point in told["curve"])
        assert exits["costs"]["every"][0] <= first <= last <= exits["costs"]["every"][-1]
    assert (workdir / "exit_examples.png").stat().st_size > 5_000
    outcome = np.load(workdir / "outcomes" / "clean.npz")
    right = outcome["exit_correct"][np.arange(360), outcome["exits"]]
    np.testing.assert_array_equal(right, outcome["correct"])
    assert found["standard_accuracy"] == right.mean()
    # More attacks with the same thresholds stand beside the others; with others they may not.
    assert set(measured("pgd2")["exits"]["under"]) == {*under, "pgd2"}
    with pytest.raises(UserError, match="with other thresholds, which would be lost"):
        measured("pgd2", thresholds="never")
    never = measured("pgd2", "never", thresholds="never")
    assert set(never["exits"]["under"]) == {"clean", "pgd2"}
    assert never["exits"]["under"]["clean"]["share"] == [0, 0, 1]
    assert never["standard_accuracy"] == under["clean"]["accuracy"][-1]
    rule = {"thresholds": "quota:0.5,0.25,0.25", "thresholds_from": "test"}
    test = measured("clean", "test", **rule)
    assert any("chosen on the test images" in warning for warning in test["warnings"])
    share = test["exits"]["under"]["clean"]["share"]
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=3 / 360)
    suite = measured("exit_suite2", "suite", examples=24)
    assert suite["robust_accuracy"]["exit_suite2"] <= suite["standard_accuracy"]
    parts = suite["attacks"]["exit_suite2"]["parts"]
    assert list(parts) == ["taken", "average", "exit1", "exit2", "main", "steer"]
    json.dumps(suite)


def test_the_curve_goes_from_all_at_the_first_exit_to_none_at_a_side_exit():
    rng = np.random.default_rng(0)
    entropies = rng.uniform(size=(500, 2)).astype(np.float32)
    nothing = np.zeros(0), np.zeros(0), None, None, 0.0
    clean = Outcome(*nothing, exit_correct=np.zeros((500, 3), bool), entropies=entropies)
    first, *_, last = sweep(clean)
    assert np.all(exits_taken(entropies, first) == 0) and np.all(exits_taken(entropies, last) == 2)


def test_results_of_another_run_are_not_written_over(tmp_path):
    config, other = small(), small()
    old = {"config": json.loads(config.to_json())}
    other.evaluation.attacks = "clean"
    assert (
        _check_place(tmp_path, old, other) is None and _check_place(tmp_path, None, other) is None
    )
    other.attack.epsilon = 0.1
    with pytest.raises(UserError, match=r"another run \(attack differs\): give another --out"):
        _check_place(tmp_path, old, other)
