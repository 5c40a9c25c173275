"""What is refused before a run is trained."""

import pytest
from rich.console import Console

from advmoe_jax.errors import UserError
from advmoe_jax.runs import build, training


def test_a_wrong_attack_is_refused_before_the_training(config, tmp_path):
    images = build.load_images(config)
    for attacks in ("pdg3", "router"):
        config.evaluation.attacks = attacks
        with pytest.raises(UserError, match=f"attack '{attacks}'"):
            training.train(config, tmp_path, images, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []
