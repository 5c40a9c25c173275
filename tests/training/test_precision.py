"""Computing in bfloat16 costs no accuracy."""

import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from advmoe_jax import experiment, runs

REPOSITORY = Path(__file__).parents[2]


def digits():
    spec = importlib.util.spec_from_file_location("digits", REPOSITORY / "configs" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.slow
def test_advmoe_in_bfloat16_is_as_accurate_on_the_digits(tmp_path):
    """At most two points below float32 after half of the shipped run's epochs."""
    accuracies = {}
    for dtype in ("float32", "bfloat16"):
        config = digits()
        config.model.dtype = dtype
        config.num_epochs, config.num_devices = 16, 1
        config.evaluation.validation_steps = 5
        workdir, console = tmp_path / dtype, Console(quiet=True)
        workdir.mkdir()
        runs.claim(workdir, config)
        images = experiment.load_images(config)
        runs.train(config, workdir, images, console)
        found = experiment.evaluate(config, workdir, images, attacks="clean,pgd20", console=console)
        assert found["config"]["model"]["dtype"] == dtype
        accuracies[dtype] = (found["standard_accuracy"], found["robust_accuracy"]["pgd20"])
    print(accuracies)
    for half, full in zip(accuracies["bfloat16"], accuracies["float32"], strict=True):
        assert full > 0.5 and half >= full - 0.02
