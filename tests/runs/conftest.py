"""A small config of the digits."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict


@pytest.fixture
def config():
    """Of a narrow dense network, trained as usual on one device."""
    path = Path(__file__).parents[2] / "configs" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update(ConfigDict({"num_devices": 1, "batch_size": 64, "num_epochs": 1}))
    config.model.update(ConfigDict({"name": "resnet10_cifar", "width": 2, "num_experts": 1}))
    config.method, config.evaluation.attacks = "standard", "clean,fgsm"
    return config
