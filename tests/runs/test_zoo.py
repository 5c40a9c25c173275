"""The networks that come with the package get the numbers that they state."""

import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.runs import load
from advmoe_jax.runs.loading import ZOO

SAMPLE = 100
ATTACKS = {"digits-advmoe": "pgd20", "digits-dense": "pgd20", "mnist-multi-exit": "main40"}
# Sums are rounded otherwise on another machine: so many images of the sample may fall there.
SLACK = 1.5 / SAMPLE
each = pytest.mark.parametrize("name", ATTACKS)


def test_all_of_them_are_small():
    files = {path.stem: path.stat().st_size for path in ZOO.iterdir()}
    assert files.keys() == ATTACKS.keys() and max(files.values()) < 10**6


@each
def test_it_says_where_it_comes_from(name):
    results = load(f"zoo:{name}").results
    for commit in (results["git_commit"], results["trained"]["git_commit"]):
        assert len(commit) == 40 and "-dirty" not in commit
    assert results["trained"]["device"] and results["attacks"]["clean"]["examples"] > SAMPLE


@each
def test_its_numbers_are_those_it_states(name):
    run, attack = load(f"zoo:{name}"), ATTACKS[name]
    assert len(run.sample.labels) == SAMPLE
    found = run.attack(attack, *run.sample, progress=False)
    stated = run.results["standard_accuracy_on_fewer"][f"clean@{SAMPLE}"]
    assert found.standard_accuracy == pytest.approx(stated, abs=SLACK)
    stated = run.results["robust_accuracy"][f"{attack}@{SAMPLE}"]
    assert found.robust_accuracy == pytest.approx(stated, abs=SLACK)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-advmoe", "digits-dense"])
def test_its_numbers_on_all_test_images(name):
    run = load(f"zoo:{name}")
    found = run.attack("pgd20", *run.images.test, progress=False)
    results, slack = run.results, 2.5 / len(found.labels)
    assert found.settings["examples"] == results["attacks"]["pgd20"]["examples"] == 360
    assert found.standard_accuracy == pytest.approx(results["standard_accuracy"], abs=slack)
    assert found.robust_accuracy == pytest.approx(results["robust_accuracy"]["pgd20"], abs=slack)


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="choose from zoo:digits-advmoe, zoo:digits-dense"):
        load("zoo:cifar")
