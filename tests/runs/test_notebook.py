"""Training as one call: it gives what the command gives, and goes on where it was."""

import jax
import numpy as np
import pytest
from rich.console import Console

import advmoe_jax as am
from advmoe_jax.runs import build, directory, training


def test_it_trains_what_the_command_trains(config, tmp_path):
    found = am.fit(config, tmp_path / "run")
    place = directory.create(str(tmp_path / "command"))
    settled = build.settled(config, typed=False)
    directory.claim(place, settled)
    training.complete(settled, place, build.load_images(settled), Console(quiet=True))
    expected = am.load(place)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.results["attacks"].keys() == {"clean", "fgsm"}
    assert found.results["attacks"]["clean"] == expected.results["attacks"]["clean"]


def test_a_second_call_loads(config, tmp_path):
    first = am.fit(config, tmp_path)
    steps = (tmp_path / "metrics.jsonl").read_text()
    second = am.fit(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert (tmp_path / "metrics.jsonl").read_text() == steps


def test_the_directory_of_another_run(config, tmp_path):
    am.fit(config, tmp_path)
    config.seed = 1
    with pytest.raises(am.UserError, match="seed"):
        am.fit(config, tmp_path)


def test_a_config_that_cannot_be_trained_makes_no_directory(config, tmp_path):
    config.num_epochs = -1
    with pytest.raises(am.UserError, match="num_epochs"):
        am.fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_config_is_left_as_it_was(config, tmp_path):
    before = config.to_json()
    am.fit(config, tmp_path)
    assert config.to_json() == before
