"""Attacks on networks with exits, on affine exits whose gradients are written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import autoattack, cross_entropy, l2, linf, pgd
from advmoe_jax.attacks.exiting import (
    Exiting,
    Seen,
    average_steps,
    decided,
    exit_steps,
    slow_down,
    steer_steps,
    taken_steps,
)
from advmoe_jax.attacks.exits import AVERAGE, max_average, on_exits, single, total_loss
from advmoe_jax.attacks.in_training import InTraining
from advmoe_jax.models.trunk import entropy

BATCH, PIXELS, CLASSES, EXITS = 40, 12, 4, 3
EPSILON = 0.1


@pytest.fixture(scope="module")
def problem():
    """(weights [exits, pixels, classes], images, labels that are mostly right)."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(EXITS, PIXELS, CLASSES)) * 3, jnp.float32)
    images = jnp.asarray(rng.uniform(size=(BATCH, PIXELS)), jnp.float32)
    labels = jnp.argmax(sum(exits_of(weights, images)), axis=-1).astype(jnp.int32)
    return weights, images, labels


def exits_of(weights, images):
    return tuple((images - 0.5) @ w for w in weights)


def look(weights, thresholds, images):
    exits = exits_of(weights, images)
    return Seen(exits, entropy(jnp.stack(exits[:-1], 1)) - thresholds)


@pytest.fixture(scope="module")
def exiting(problem):
    return Exiting(jax.tree_util.Partial(look, problem[0], jnp.asarray([0.4, 0.6])))


def made(loss, threat=None, num_steps=5):
    return pgd(threat or linf(EPSILON), num_steps=num_steps, step_size=0.04, loss=loss)


def losses(weights, images, labels):
    return np.stack([cross_entropy(e, labels) for e in exits_of(weights, images)])


def test_a_step_of_each_goes_where_its_gradient_points(problem):
    weights, images, labels = problem
    function = partial(exits_of, weights)
    p = [np.asarray(jax.nn.softmax(e)) - np.eye(CLASSES)[labels] for e in exits_of(weights, images)]
    gradients = np.stack([g @ np.asarray(w).T for g, w in zip(p, weights, strict=True)])
    for aim, gradient in (
        ("main", gradients[2]),
        ("exit2", gradients[1]),
        ("average", gradients.mean(0)),
    ):
        attack = on_exits(
            aim, lambda loss: pgd(linf(1.0), num_steps=1, step_size=0.01, loss=loss, start="none")
        )
        found = attack(function, images, labels, jax.random.key(0))
        expected = np.clip(images + 0.01 * np.sign(gradient), 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_max_average_is_the_worst_candidate_of_every_image(problem):
    weights, images, labels = problem
    function, key = partial(exits_of, weights), jax.random.key(1)
    found = max_average(made)(function, images, labels, key)
    keys = jax.random.split(key, BATCH)
    candidates = [
        made(single(i))(function, images, labels, jax.vmap(jax.random.fold_in, (0, None))(keys, i))
        for i in range(EXITS)
    ]
    sums = np.stack([losses(weights, c, labels).sum(0) for c in candidates])
    reached = np.asarray(total_loss(function(found), labels))
    assert np.all(reached >= sums - 1e-5)
    np.testing.assert_allclose(reached, sums.max(0), rtol=1e-5)
    chosen = sums.argmax(0)
    assert len(set(chosen)) > 1  # no exit is the worst of all images
    np.testing.assert_array_equal(found, np.stack(candidates)[chosen, np.arange(BATCH)])


@pytest.mark.parametrize(
    "threat", [linf(EPSILON), pytest.param(l2(0.3), marks=pytest.mark.slow)], ids=["linf", "l2"]
)
def test_no_attack_leaves_the_ball_or_the_range(problem, exiting, threat, assert_valid):
    weights, images, labels = problem
    key = jax.random.key(0)
    for aim in ("main", "exit1", "average", "max_average"):
        attack = on_exits(aim, partial(made, threat=threat))
        assert_valid(threat, attack(partial(exits_of, weights), images, labels, key), images)
    assert_valid(threat, slow_down(threat, num_steps=8)(exiting, images, labels, key), images)
    parts = {
        "taken": taken_steps(threat, num_steps=8),
        "average": average_steps(threat, num_steps=8),
        "exit1": exit_steps(threat, 0, num_steps=8),
        "steer": steer_steps(threat, EXITS, num_steps=8),
    }
    suite = autoattack(threat, "custom", attacks=parts)
    result = suite(exiting, images, labels, key, progress=False)
    assert_valid(threat, result.adversarial, images)
    # What is said to be fooled is fooled, by the dynamic network's own judgement.
    fooled = np.argmax(exiting(jnp.asarray(result.adversarial)), -1) != labels
    np.testing.assert_array_equal(fooled, ~result.robust)
    assert 0 < result.robust.sum() < result.clean_accuracy * BATCH
    # Per image the minimum: no part alone does better.
    for name, steps in parts.items():
        alone = autoattack(threat, "custom", attacks={name: steps})
        one = alone(exiting, images, labels, key, progress=False)
        assert np.all(one.robust >= result.robust)


def test_the_exit_that_is_taken_decides(problem, exiting):
    weights, images, _ = problem
    seen = exiting.look(images)
    entropies = np.stack([entropy(e) for e in exits_of(weights, images)[:-1]], axis=1)
    leaves = entropies < [0.4, 0.6]
    taken = np.where(leaves.any(1), leaves.argmax(1), 2)
    assert set(taken) == {0, 1, 2}
    expected = np.stack(exits_of(weights, images), 1)[np.arange(BATCH), taken]
    np.testing.assert_array_equal(decided(seen), expected)
    np.testing.assert_array_equal(exiting(images), expected)


def test_slowing_down_keeps_images_in(problem, exiting):
    _, images, labels = problem

    def early(x):
        return int(np.sum(np.any(np.asarray(exiting.look(x).excess) < 0, axis=1)))

    attack = slow_down(linf(EPSILON), num_steps=30)
    slowed = attack(exiting, images, labels, jax.random.key(0))
    assert early(slowed) < early(images) / 2 and early(images) > BATCH / 4


def test_an_attack_in_training_mode_remembers_every_pass(problem):
    weights, images, labels = problem
    keys = jax.random.split(jax.random.key(0), BATCH)

    def counting(x, memory, number):
        count, numbers = memory
        return exits_of(weights, x), (count + 1, numbers.at[number].add(1))

    for aim, passes in (("main", 4), ("average", 4), ("exit1", 4), ("max_average", 3 * 4 + 3)):
        attack = InTraining(aim, linf(EPSILON), 4, 0.04)
        memory = (jnp.zeros((), jnp.int32), jnp.zeros(20, jnp.int32))
        found, (count, numbers) = attack(counting, images, labels, keys, memory, EXITS)
        # Every pass has a number of its own: 10 steps and 7 exits would be 77 of them.
        assert count == passes
        np.testing.assert_array_equal(numbers, [1] * passes + [0] * (20 - passes))
        # Of a function that does not change it is PGD.
        if aim != "max_average":
            usual = on_exits(aim, partial(made, num_steps=4))
            np.testing.assert_array_equal(
                found, usual(partial(exits_of, weights), images, labels, keys)
            )


def test_average_has_won_when_every_exit_errs():
    right, wrong = jnp.asarray([[5.0, 0.0]]), jnp.asarray([[0.0, 5.0]])
    labels = jnp.asarray([0])
    assert not AVERAGE.fooled((right, wrong), labels)[0]
    assert AVERAGE.fooled((wrong, wrong), labels)[0]
    assert AVERAGE.value((right, wrong), labels)[0] == pytest.approx(
        (0.0067 + 5.0067) / 2, rel=1e-2
    )


def test_an_unknown_aim():
    with pytest.raises(ValueError, match="no aim"):
        on_exits("exit0", made)
