"""RDI-Nets' step, against gradients written out by hand in NumPy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.attacks import linf
from advmoe_jax.errors import UserError
from advmoe_jax.models.output import Output
from advmoe_jax.training.methods import (
    METHODS,
    AttackSettings,
    ExitSettings,
    Settings,
    create_step,
)
from advmoe_jax.training.state import create_state

PIXELS, CLASSES, EXITS, BATCH, RATE, BETA = 6, 4, 3, 10, 0.1, 5.0


def affine():
    """Exits x E[i]; its statistics count the passes in training mode."""

    def apply(params, stats, images, *, train=False, noise=None, axis_name=None, keys=None):
        assert keys is None or (train and keys.shape == (len(images),))
        exits = tuple(images @ w for w in params["backbone"]["E"])
        stats = {"backbone": {"passes": stats["backbone"]["passes"] + int(train)}}
        return Output(exits[-1], None, exits), stats

    return SimpleNamespace(
        apply=apply,
        num_exits=EXITS,
        is_stochastic=True,
        gate="straight_through",
        num_routers=0,
        score_shape=(),
        parts=("backbone",),
        stacked={"backbone": {"E": False}},
        is_moe=False,
    )


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(EXITS, PIXELS, CLASSES)).astype(np.float32)
    images = rng.uniform(0.2, 0.8, size=(BATCH, PIXELS)).astype(np.float32)
    return weights, images, rng.integers(CLASSES, size=BATCH)


def run(problem, attack, microbatches=1, **settings):
    weights, images, labels = problem
    optimizers = {"backbone": optax.sgd(RATE)}
    settings = Settings(beta=BETA, exits=ExitSettings(**settings))
    if attack is None:
        attack = METHODS["multi_exit"].attack(AttackSettings(linf(0.1), 4, 0.05), settings)
    step = create_step(
        "multi_exit", affine(), optimizers, attack, settings, microbatches=microbatches
    )
    params = {"backbone": {"E": jnp.asarray(weights)}}
    state = create_state(params, {"backbone": {"passes": jnp.zeros(())}}, optimizers)
    keys = jax.random.split(jax.random.key(0), BATCH)
    new, metrics = jax.jit(step)(state, images, labels, keys)
    return new, metrics


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def shifted(function, images, labels, keys, clean_outputs):
    """An attack whose images are known."""
    return jnp.clip(images + 0.1, 0, 1)


@pytest.mark.parametrize("objective", ["halves", "trades"])
@pytest.mark.parametrize("microbatches", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_one_step_equals_gradients_written_out(problem, objective, microbatches):
    weights, images, labels = problem
    of_exits = (0.5, 1.0, 2.0)
    new, metrics = run(problem, shifted, microbatches, objective=objective, weights=of_exits)
    attacked, onehot = np.clip(images + 0.1, 0, 1), np.eye(CLASSES)[labels]
    total = 0.0
    for number, weight in enumerate(of_exits):
        p, q = (softmax(x @ weights[number]) for x in (images, attacked))
        ce_clean, ce_attacked = (-(onehot * np.log(z)).sum(-1).mean() for z in (p, q))
        if objective == "halves":
            loss = (ce_clean + ce_attacked) / 2
            gradient = (images.T @ (p - onehot) + attacked.T @ (q - onehot)) / (2 * BATCH)
        else:
            log_ratio = np.log(p) - np.log(q)
            of_kl = p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True))
            loss = ce_clean + BETA * (p * log_ratio).sum(-1).mean()
            gradient = images.T @ (p - onehot + BETA * of_kl) + attacked.T @ (BETA * (q - p))
            gradient /= BATCH
        total += weight * loss
        expected = weights[number] - RATE * weight * gradient
        np.testing.assert_allclose(new.params["backbone"]["E"][number], expected, atol=2e-6)
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    main = [np.argmax(x @ weights[-1], -1) == labels for x in (images, attacked)]
    assert metrics["standard_accuracy"] == pytest.approx(main[0].mean())
    assert metrics["robust_accuracy"] == pytest.approx(main[1].mean())


def test_without_a_defence_clean_images_alone_are_learned(problem):
    weights, images, labels = problem
    new, metrics = run(problem, None, defence="none")
    onehot = np.eye(CLASSES)[labels]
    for number in range(EXITS):
        gradient = images.T @ (softmax(images @ weights[number]) - onehot) / BATCH
        expected = weights[number] - RATE * gradient
        np.testing.assert_allclose(new.params["backbone"]["E"][number], expected, atol=2e-6)
    assert "robust_accuracy" not in metrics


@pytest.mark.parametrize(
    ("defence", "attacks"),
    [("main", 4), ("exit1", 4), ("average", 4), ("max_average", 3 * 4 + 3)],
)
def test_in_training_mode_every_pass_moves_the_statistics(problem, defence, attacks):
    for mode, passes in (("inference", 2), ("train", attacks + 2)):
        new, _ = run(problem, None, defence=defence, attack_mode=mode)
        assert new.stats["backbone"]["passes"] == passes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"defence": "strongest"}, "choose one of none, main"),
        ({"defence": "exit3"}, "2 side exits"),
        ({"weights": (1.0, 2.0)}, "3 exits"),
        ({"weights": (1.0, -1.0, 1.0)}, "negative"),
        ({"objective": "kl"}, "halves, trades"),
        ({"attack_mode": "eval"}, "inference, train"),
    ],
)
def test_wrong_settings_are_told_in_one_line(problem, settings, words):
    with pytest.raises(UserError, match=words) as told:
        run(problem, shifted, **settings)
    assert "\n" not in str(told.value)


def test_microbatches_do_not_go_with_training_mode(problem):
    with pytest.raises(UserError, match="microbatches=1"):
        run(problem, None, 2, attack_mode="train")


def test_training_mode_needs_a_method_that_has_it():
    network = SimpleNamespace(parts=("backbone",), gate="straight_through")
    settings = Settings(exits=ExitSettings(attack_mode="train"))
    with pytest.raises(UserError, match=r"attack\.mode='train' is of method='multi_exit'"):
        create_step("at", network, {"backbone": optax.sgd(0.1)}, shifted, settings)


@pytest.mark.parametrize("defence", ["none", "main", "max_average"])
def test_without_an_attack_the_best_checkpoint_is_that_of_clean_images(defence):
    """There is no robust accuracy worth choosing by: it is the chance of an early epoch."""
    settings = Settings(exits=ExitSettings(defence=defence))
    chosen = "standard_accuracy" if defence == "none" else "robust_accuracy"
    assert METHODS["multi_exit"].selected_by(settings) == chosen
