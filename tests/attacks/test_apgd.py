"""APGD: its iterates against NumPy, its return to the best point, its losses and targets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import Loss, apgd, l1, l2, linf
from advmoe_jax.attacks.apgd import apgd_steps
from advmoe_jax.attacks.losses import make_loss
from advmoe_jax.attacks.schedule import checkpoints
from advmoe_jax.attacks.stepwise import Batch, likely_wrong

BALLS = {"linf": linf(0.1), "l2": l2(0.5), "l1": l1(3.0)}


def numpy_apgd(loss, gradient, clean, epsilon, num_steps):
    """Algorithm 1 in linf, for one image, from the clean image, as it reads in the paper.

    Returns every point looked at, and the step sizes.
    """

    def project(x):
        return np.clip(np.clip(x, clean - epsilon, clean + epsilon), 0, 1)

    at = checkpoints(num_steps)
    step, x, previous = 2 * epsilon, clean, clean
    losses, best, best_loss = [loss(clean)], clean, loss(clean)
    points, steps = [clean], []
    raised, halved, best_before, last = 0, False, best_loss, 0
    for k in range(num_steps):
        z = project(x + step * np.sign(gradient(x)))
        a = 1.0 if k == 0 else 0.75
        new = project(x + a * (z - x) + (1 - a) * (x - previous))
        previous, steps = x, [*steps, step]
        points.append(new)
        raised += loss(new) > losses[-1]
        losses.append(loss(new))
        if loss(new) > best_loss:
            best, best_loss = new, loss(new)
        x = new
        if k + 1 in at:
            few = raised < 0.75 * (k + 1 - last)
            now = few or (not halved and best_loss <= best_before)
            if now:
                step, x = step / 2, best
                losses[-1] = best_loss
            halved, best_before, raised, last = now, best_loss, 0, k + 1
    return np.array(points), steps


def bumpy(x):
    """A loss with many small hills, so that steps are halved and best points returned to."""
    flat = x.reshape(len(x), -1)
    slopes = jnp.linspace(-1, 1, flat.shape[1])
    return jnp.sum(slopes * flat + 0.3 * jnp.sin(37 * flat * (1 + slopes)), axis=1)


def test_iterates_steps_and_returns_to_the_best_point_against_numpy():
    clean = np.random.default_rng(0).uniform(size=(4, 2, 3, 1)).astype(np.float32)
    loss = Loss(lambda outputs, _: outputs, lambda outputs, _: outputs > 1e9)
    steps = apgd_steps(linf(0.1), loss=loss, num_steps=30, start="none")
    keys = jax.random.split(jax.random.key(0), 4)
    zeros = jnp.zeros(4, jnp.int32)
    batch = Batch(jnp.asarray(clean), zeros, zeros, zeros, keys)
    state, points, lengths = steps.begin(batch), [], []
    advance = jax.jit(partial(steps.step, bumpy))
    for _ in range(31):
        points.append(np.asarray(state.images))
        state = advance(batch, state)
        lengths.append(np.asarray(state.step_size))
    value = jax.jit(lambda x: bumpy(x[None])[0])
    gradient = jax.jit(jax.grad(lambda x: bumpy(x[None])[0]))
    halvings = 0
    for i in range(4):
        expected, sizes = numpy_apgd(
            lambda x: float(value(x.astype(np.float32))),
            lambda x: np.asarray(gradient(x.astype(np.float32))),
            clean[i],
            np.float32(0.1),
            30,
        )
        # The first step that goes another way by rounding would carry all others with it.
        got = np.array([p[i] for p in points])
        # A returned-to point is looked at by the next step, not anew.
        np.testing.assert_allclose(got, expected, atol=1e-5)
        np.testing.assert_allclose([s[i] for s in lengths[:30]], sizes, rtol=1e-6)
        halvings += round(np.log2(0.2 / lengths[-1][i]))
    assert halvings >= 8


def test_the_best_point_is_what_comes_back():
    images = jnp.asarray(np.random.default_rng(1).uniform(size=(5, 2, 3, 1)), jnp.float32)
    loss = Loss(lambda outputs, _: outputs, lambda outputs, _: outputs > 1e9)
    run = jax.jit(partial(apgd(linf(0.1), loss=loss, num_steps=20), bumpy))
    result = run(images, jnp.zeros(5, int), jax.random.key(0))
    # Never below the start, whatever it was, and better than plain sign steps at its own game.
    few = jax.jit(partial(apgd(linf(0.1), loss=loss, num_steps=3), bumpy))
    assert np.all(bumpy(result) >= bumpy(few(images, jnp.zeros(5, int), jax.random.key(0))) - 1e-5)


FAST = ("ce", "linf"), ("ce", "l1"), ("dlr_targeted", "l2")
SLOW = [(loss, norm) for loss in ("ce", "dlr", "dlr_targeted") for norm in BALLS]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW if pair not in FAST]


@pytest.mark.parametrize(("loss", "norm"), [*FAST, *SLOW])
def test_fools_and_stays_inside(networks, assert_valid, norm, loss):
    network, threat = networks["standard"], BALLS[norm]
    images, labels = network.images[:100], network.labels[:100]
    settings = {"num_targets": 3} if loss == "dlr_targeted" else {}
    attack = apgd(threat, loss=loss, num_steps=30, **settings)
    result = jax.jit(partial(attack, network.function))(images, labels, jax.random.key(0))
    assert_valid(threat, result, images)
    assert network.accuracy(result) < network.accuracy(images) - 0.25


@pytest.mark.slow
def test_other_pixel_ranges(networks, assert_valid):
    network, threat = networks["standard"], BALLS["l1"]
    images, labels = network.images[:50], network.labels[:50]
    run = jax.jit(partial(apgd(threat, num_steps=10), network.function))
    plain = run(images, labels, jax.random.key(0))
    wide = threat._replace(epsilon=threat.epsilon * 255, lower=-100.0, upper=155.0)
    scaled = jax.jit(
        partial(apgd(wide, num_steps=10), lambda x: network.function((x + 100) / 255))
    )(images * 255 - 100, labels, jax.random.key(0))
    assert_valid(wide, scaled, images * 255 - 100)
    accuracies = network.accuracy(plain), network.accuracy((scaled + 100) / 255)
    assert abs(accuracies[0] - accuracies[1]) <= 0.04


@pytest.mark.slow
def test_more_restarts_never_find_less(networks):
    network = networks["robust"]
    loss = make_loss("ce")
    values = []
    for restarts in (1, 3):
        attack = apgd(linf(0.1), num_steps=5, restarts=restarts)
        run = jax.jit(partial(attack, network.function))
        logits = network.function(run(network.images, network.labels, jax.random.key(0)))
        values.append((loss.fooled(logits, network.labels), loss.value(logits, network.labels)))
    (fooled, value), (fooled_more, value_more) = values
    assert np.all(fooled_more >= fooled)
    same = fooled == fooled_more
    assert np.all(value_more[same] >= value[same] - 1e-4)


def test_targeted(networks):
    network = networks["standard"]
    wanted = (network.labels + 1) % 10
    attack = apgd(linf(0.3), num_steps=30, targeted=True)
    result = jax.jit(partial(attack, network.function))(network.images, wanted, jax.random.key(0))
    reached = np.argmax(network.function(result), axis=1) == wanted
    assert np.mean(reached) > 0.7


@pytest.mark.slow
def test_an_image_is_attacked_alone(networks):
    network = networks["robust"]
    keys = jax.random.split(jax.random.key(0), 20)
    run = jax.jit(partial(apgd(linf(0.1), num_steps=10, restarts=2), network.function))
    whole = run(network.images[:20], network.labels[:20], keys)
    some = jnp.array([3, 17, 8])
    part = run(network.images[some], network.labels[some], keys[some])
    np.testing.assert_allclose(part, whole[some], atol=1e-5)


def test_noise_is_averaged():
    """Where noise swamps one gradient, the mean of many still points the right way."""
    images = jnp.full((16, 4, 4, 1), 0.5)

    def noisy(x, keys):
        noise = jax.vmap(lambda k: jax.random.normal(k, (4, 4, 1)))(keys)
        score = jnp.sum(x * (1 + 3 * noise), axis=(1, 2, 3))
        return jnp.stack([-score, score], axis=1)

    def raised(samples):
        attack = apgd(linf(0.1), num_steps=1, start="none", eot_samples=samples)
        result = jax.jit(partial(attack, noisy))(images, jnp.zeros(16, int), jax.random.key(0))
        return float(np.mean(result > 0.5))

    assert raised(100) > 0.9 > 0.75 > raised(1)


def test_likely_wrong_classes():
    logits = jnp.array([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 2.0, 4.0]])
    np.testing.assert_array_equal(likely_wrong(logits, jnp.array([0, 1])), [[2, 1, 3], [3, 0, 2]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"loss": "kl"}, "APGD compares with labels"),
        ({"start": "gaussian"}, "start 'gaussian' is unknown; choose one of uniform, none"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"loss": "dlr_targeted", "targeted": True}, "chooses its targets itself"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        apgd(linf(0.1), **settings)


@pytest.mark.parametrize(
    ("classes", "settings", "words"),
    [
        (3, {"loss": "dlr_targeted", "num_targets": 2}, "needs 4 classes, the function has 3"),
        (5, {"loss": "dlr_targeted"}, "num_targets=9, but 5 classes leave 4 wrong ones"),
        (5, {"loss": "ce_targeted", "num_targets": 5}, "give at most 4"),
    ],
)
def test_too_few_classes(classes, settings, words):
    images = jnp.zeros((2, classes))
    with pytest.raises(ValueError, match=words):
        apgd(linf(0.1), **settings)(lambda x: x, images, jnp.zeros(2, int), jax.random.key(0))
