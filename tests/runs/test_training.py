"""One small run from its config to its report, and what is refused before a run is trained."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.models.cnn import CNN
from advmoe_jax.runs import build, directory, load, training


def test_training_may_start_from_equal_experts(config, tmp_path):
    config.model.update({"num_experts": 3, "ratio": 0.5, "dispatch": "blocks"})
    config.model.router.update({"blocks": 0, "resolution": 8})
    config.method, config.num_epochs, config.data.train_examples = "advmoe", 1, 64
    config.start.equal_experts, config.balance.shared_steps = True, 1.0
    config.evaluation.validation_steps, config.evaluation.attacks = 1, "clean"
    images = build.load_images(config)
    directory.claim(tmp_path, config)
    training.train(config, tmp_path, images, Console(quiet=True))
    network, params, _ = directory.restore_network(config, tmp_path, images)
    kernels = zip(jax.tree.leaves(params), jax.tree.leaves(network.stacked), strict=True)
    kernels = [np.asarray(x) for x, is_stacked in kernels if is_stacked]
    assert len(kernels) > 5
    for kernel in kernels:
        np.testing.assert_allclose(kernel, np.broadcast_to(kernel[:1], kernel.shape), atol=1e-6)


def test_experts_that_were_trained_are_not_made_one(config, tmp_path):
    config.start.equal_experts, config.start.run = True, str(tmp_path / "other")
    images = build.load_images(config)
    directory.claim(tmp_path / "run", config)
    with pytest.raises(UserError, match=r"would make the experts of start.run one: set one"):
        training.train(config, tmp_path / "run", images, Console(quiet=True))


def test_what_was_learned_from_is_no_test(config):
    config.data.test_split = config.data.train_split
    with pytest.raises(UserError, match=r"nothing can be tested on .*data.test_split='withheld'"):
        build.load_images(config)


def test_a_run_is_of_its_classes(config, tmp_path):
    kind = build.load_images(config).kind
    directory.check_kind(tmp_path, kind)  # nothing is known yet
    directory.write_kind(tmp_path, kind)
    directory.check_kind(tmp_path, kind._replace(name="the same elsewhere"))
    other = kind._replace(class_names=("z", *kind.class_names[1:]))
    with pytest.raises(UserError, match=r"have class_names=\('z', .* that it was trained on"):
        directory.check_kind(tmp_path, other)


def test_every_class_has_an_expert_or_none(config):
    config.loss.class_experts = (0, 1)
    with pytest.raises(UserError, match=r"experts of 2 classes, digits has 10"):
        build.load_images(config)


def test_from_config_to_report_and_again(config, tiny_model, tmp_path, monkeypatch):
    def create(self, *, in_channels, num_classes, rngs):
        return tiny_model(self.num_experts, num_classes)

    monkeypatch.setattr(CNN, "create", create)
    network_cost.cache_clear()
    config.data.train_examples, config.evaluation.validation_steps = 128, 1
    config.evaluation.show_every = 1
    images = build.load_images(config)
    directory.claim(tmp_path, config)
    found = training.complete(config, tmp_path, images, Console(quiet=True))
    network_cost.cache_clear()
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert list(found["robust_accuracy"]) == ["fgsm"] and found["steps"] == 2
    assert found["attacks"]["clean"]["examples"] == len(images.test.labels)
    assert found["evaluated"]["params_sha256"] == found["params_sha256"]
    (epoch,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert epoch["step"] == 2 and epoch["validation"].keys() >= {"standard_accuracy", "routing"}
    for name in ("report.html", "curves.png", "config.json", "outcomes/fgsm.npz"):
        assert (tmp_path / name).stat().st_size > 100
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"attacked_images" in events.read_bytes()
    with monkeypatch.context() as patch:  # a notebook elsewhere has no data
        patch.setattr(build, "load_images", None)
        run = load(tmp_path)
        attacked = run.attack("fgsm", *images.test, progress=False)
    assert run.results == found and run.kind == images.kind
    kept = np.load(tmp_path / "outcomes" / "fgsm.npz")
    np.testing.assert_array_equal(attacked.robust, kept["correct"])
    np.testing.assert_array_equal(attacked.attacked.predictions, kept["predictions"])
    again = training.complete(config, tmp_path, images, Console(quiet=True))
    assert again["params_sha256"] == found["params_sha256"]
    assert again["robust_accuracy"] == found["robust_accuracy"]
