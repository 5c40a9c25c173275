"""A trained network in a notebook: what it answers, how it is attacked, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax import attacks
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import views
from advmoe_jax.runs import Run
from advmoe_jax.runs.build import ImageKind

KIND = ImageKind("made up", (8, 8, 1), ("a", "b", "c", "d"))
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
LABELS = np.arange(20, dtype=np.int64) % 4


@pytest.fixture
def run(config, tiny):
    config.evaluation.batch_size = 16
    return Run("tiny", config, KIND, *tiny(2))


@pytest.fixture
def dense(config, tiny):
    return Run("tiny", config, KIND, *tiny(1))


def test_answers_are_the_networks_own(run):
    images = jnp.asarray(IMAGES, jnp.float32) / 255
    output = run.network.apply(run.params, run.stats, images)[0]
    np.testing.assert_allclose(run.logits(IMAGES), output.logits, atol=1e-6)
    np.testing.assert_array_equal(run.predict(IMAGES), jnp.argmax(output.logits, -1))
    np.testing.assert_array_equal(run.routes(IMAGES), output.routing.indices)
    assert run.exits(IMAGES) is None
    assert len(np.unique(run.routes(IMAGES))) == 2  # there is something to tell apart


def test_bytes_and_floats_are_the_same_images(run):
    np.testing.assert_allclose(run.logits(IMAGES), run.logits(IMAGES / np.float32(255)), atol=1e-6)
    np.testing.assert_array_equal(run.predict(IMAGES), run.predict(IMAGES / 255))


def test_logits_are_differentiable(run):
    gradient = jax.grad(lambda x: run.logits(x)[:, 0].sum())(jnp.asarray(IMAGES) / 255.0)
    assert gradient.shape == IMAGES.shape and jnp.any(gradient != 0)


def test_an_attack_is_evaluates(run):
    """By the attack itself, on the network's own function."""
    found = run.attack("pgd3", IMAGES, LABELS, progress=False)
    protocol = run.config.attack.epsilon, run.config.evaluation.step_size
    attack = attacks.pgd(attacks.linf(protocol[0]), num_steps=3, step_size=protocol[1])
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 3), i))
    images = jnp.asarray(IMAGES) / jnp.float32(255)
    function = views.logits(run.network, run.params, run.stats)
    expected = attack(function, images, jnp.asarray(LABELS), keys(jnp.arange(20)))
    np.testing.assert_allclose(found.images, expected, atol=1e-6)
    np.testing.assert_array_equal(found.robust, run.predict(found.images) == LABELS)
    np.testing.assert_array_equal(found.clean.correct, run.predict(IMAGES) == LABELS)
    kept = run.routes(found.images) == run.routes(IMAGES)
    assert found.agreement == kept.mean()
    assert found.settings["examples"] == 20 and found.settings["num_steps"] == 3
    assert repr(found).startswith("pgd3 (linf, epsilon 0.2): 20 images, SA ")
    assert f"routes kept {kept.mean():.1%}" in repr(found)


def test_another_ball(run):
    found = run.attack("fgsm", IMAGES, LABELS, norm="l2", epsilon=0.5, progress=False)
    far = np.linalg.norm((found.images - IMAGES / np.float32(255)).reshape(20, -1), axis=1)
    assert found.settings["epsilon"] == 0.5 and far.max() <= 0.5 + 1e-5 and far.max() > 0.4
    assert found.name == "fgsm@l2-0.5"


def test_clean_images_are_an_attack_that_does_nothing(dense):
    found = dense.attack("clean", IMAGES, LABELS, progress=False)
    np.testing.assert_allclose(found.images, IMAGES / np.float32(255), atol=1e-7)
    assert found.agreement is None and dense.routes(IMAGES) is None
    assert found.robust_accuracy == found.standard_accuracy


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (IMAGES.astype(np.float32), "pixels reach from 0 to 255: give float32 in"),
        (IMAGES.astype(np.int64), "images are int64: give uint8 in 0 to 255"),
        (IMAGES[0], r"images are \(8, 8, 1\): this network takes \[n, 8, 8, 1\]"),
        (IMAGES[..., 0], "images are"),
    ],
)
def test_other_images_are_refused(run, images, told):
    for ask in (run.logits, run.predict, run.routes, lambda x: run.attack("pgd0", x, LABELS)):
        with pytest.raises(UserError, match=told):
            ask(images)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "pdg20"}, "attack 'pdg20' is unknown"),
        ({"labels": LABELS[:3]}, "do not match"),
        ({"labels": LABELS + 1}, "labels reach from 1 to 4; the network's classes are 0 to 3"),
        ({"labels": LABELS / 2}, "labels are float64: give integers"),
        ({"epsilon": 8}, "--epsilon=8 is wider than the pixels' range"),
        ({"epsilon": 200, "norm": "l2"}, "reaches every image"),
        ({"norm": "l2"}, "--norm=l2 needs an --epsilon"),
        ({"batch_size": -1}, "batch_size=-1 must not be negative"),
        ({"name": "exit1"}, "attack 'exit1' is on the part 'exits'"),
    ],
)
def test_an_attack_that_cannot_be_is_refused(run, arguments, told):
    asked = {"name": "pgd1", "images": IMAGES, "labels": LABELS, "progress": False}
    with pytest.raises(UserError, match=told):
        run.attack(**asked | arguments)


def test_a_run_says_what_it_is(run, dense):
    assert repr(run).startswith("tiny: made up, resnet10_cifar, 2 experts, ")
    dense.results = {"standard_accuracy": 0.5, "robust_accuracy": {"pgd20": 0.25}}
    assert repr(dense).endswith("SA 50.0%, RA 25.0% pgd20")
