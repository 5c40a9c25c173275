"""Projected gradient ascent: never outside the threat model, and exactly what it says."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from advmoe_jax.attacks import Loss, cross_entropy, fgsm, kl, l2, linf, pgd
from advmoe_jax.attacks.constraints import diameter, uniform_start
from advmoe_jax.attacks.losses import make_loss
from advmoe_jax.models.layers import conv2d
from advmoe_jax.parallel import data_mesh

BALLS = {"linf": linf, "l2": l2}
SHAPE, CLASSES = (4, 4, 1), 3


def random_images(batch, seed=0):
    """Uniform pixels, some of them at the ends of the range."""
    pixels = np.random.default_rng(seed).uniform(-0.2, 1.2, (batch, *SHAPE))
    return jnp.asarray(pixels.clip(0, 1), jnp.float32)


def random_labels(batch, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CLASSES, batch))


def random_weights(kind, seed=0):
    """A linear map, a small MLP, a constant (no gradient) or one that is not a number."""
    rng = np.random.default_rng(seed)
    linear, first = rng.normal(size=(2, 16, CLASSES))
    second = rng.normal(size=(CLASSES, CLASSES))
    scale = {"linear": (1, 0), "mlp": (0.1, 3), "constant": (0, 0), "nan": (np.nan, 1)}[kind]
    weights = scale[0] * linear, 2 * first, scale[1] * second
    return [jnp.asarray(w, jnp.float32) for w in weights]


def classify(weights, images):
    flat = images.reshape(len(images), -1)
    return flat @ weights[0] + jnp.tanh((flat - 0.5) @ weights[1]) @ weights[2]


def distance(norm, images, clean):
    delta = np.asarray(images, np.float64) - np.asarray(clean, np.float64)
    delta = delta.reshape(len(delta), -1)
    return np.abs(delta).max(axis=1) if norm == "linf" else np.sqrt((delta**2).sum(axis=1))


@lru_cache
def compiled(norm, loss, start, momentum, restarts):
    @jax.jit
    def run(weights, images, labels, key, epsilon, step_size):
        threat = BALLS[norm](epsilon)
        settings = {"num_steps": 3, "start_scale": 0.05, "restarts": restarts}
        attack = pgd(
            threat, step_size=step_size, loss=loss, start=start, momentum=momentum, **settings
        )
        return attack(partial(classify, weights), images, labels, key)

    return run


@settings(deadline=None, max_examples=40)
@given(
    setting=st.sampled_from(
        [
            ("linf", "cross_entropy", "none", 0.0, 1),
            ("linf", "margin", "uniform", 0.9, 1),
            ("linf", "kl", "gaussian", 0.0, 3),
            ("linf", "dlr", "uniform", 0.0, 3),
            ("l2", "cross_entropy", "uniform", 0.0, 1),
            ("l2", "dlr", "none", 0.75, 1),
            ("l2", "kl", "gaussian", 0.0, 1),
            ("l2", "margin", "uniform", 0.75, 3),
        ]
    ),
    kind=st.sampled_from(["linear", "mlp", "constant", "nan"]),
    epsilon=st.one_of(st.sampled_from([1e-8, 8 / 255, 1.5, 100.0]), st.floats(1e-6, 3)),
    relative_step=st.sampled_from([1e-3, 0.25, 1.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_stays_in_the_ball_and_in_the_pixel_range(setting, kind, epsilon, relative_step, seed):
    norm, weights, images = setting[0], random_weights(kind, seed), random_images(3, seed)
    step = np.float32(relative_step * epsilon)
    key, labels = jax.random.key(seed % 1000), random_labels(3, seed)
    result = compiled(*setting)(weights, images, labels, key, np.float32(epsilon), step)
    assert result.shape == images.shape and result.dtype == images.dtype
    assert np.all(np.isfinite(result))
    assert result.min() >= 0 and result.max() <= 1
    tolerance = 1e-6 if norm == "linf" else 1e-5
    assert distance(norm, result, images).max() <= epsilon + tolerance


@pytest.mark.parametrize("norm", BALLS)
def test_other_pixel_ranges(norm):
    images = 255 * random_images(3)
    threat = BALLS[norm](8.0, lower=0.0, upper=255.0)
    attack = pgd(threat, num_steps=4, step_size=4.0, start="none")
    function = partial(classify, [w / 255 for w in random_weights("linear")])
    result = jax.jit(partial(attack, function))(images, random_labels(3), jax.random.key(0))
    assert result.min() >= 0 and 1 < result.max() <= 255
    assert distance(norm, result, images).max() <= 8 * (1 + 1e-5)
    widest = diameter(BALLS[norm](1.0, -1.0, 0.5), images.shape[1:])
    shifted = pgd(BALLS[norm](widest, -1.0, 0.5), num_steps=1, step_size=5.0, start="none")
    result = jax.jit(partial(shifted, function))(
        random_images(3) - 0.75, random_labels(3), jax.random.key(0)
    )
    assert result.min() >= -1 and result.max() <= 0.5
    assert np.ptp(result) > 1


def test_bfloat16_images_stay_bfloat16():
    images = random_images(2).astype(jnp.bfloat16)
    function = partial(classify, random_weights("linear"))
    for norm, restarts in (("linf", 1), ("l2", 3)):
        attack = pgd(BALLS[norm](0.1), num_steps=2, step_size=0.05, momentum=0.5, restarts=restarts)
        result = jax.jit(partial(attack, function))(images, random_labels(2), jax.random.key(0))
        assert result.dtype == jnp.bfloat16 and np.all(np.isfinite(result))


def numpy_gradient(weights, images, labels):
    """Of the cross-entropy of a linear map, in float64."""
    flat = np.asarray(images, np.float64).reshape(len(images), -1)
    weight = np.asarray(weights[0], np.float64)
    logits = flat @ weight
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return ((probabilities - np.eye(CLASSES)[labels]) @ weight.T).reshape(images.shape)


def numpy_pgd(norm, weights, clean, labels, epsilon, step_size, num_steps, momentum):
    clean = np.asarray(clean, np.float64)
    images, velocity = clean, np.zeros_like(clean)

    def length(x):
        return np.sqrt((x**2).sum(axis=(1, 2, 3), keepdims=True))

    for _ in range(num_steps):
        gradient = numpy_gradient(weights, images, labels)
        if momentum:
            gradient = gradient / np.abs(gradient).mean(axis=(1, 2, 3), keepdims=True)
            gradient = velocity = momentum * velocity + gradient
        direction = np.sign(gradient) if norm == "linf" else gradient / length(gradient)
        delta = images + step_size * direction - clean
        if norm == "linf":
            delta = delta.clip(-epsilon, epsilon)
        else:
            delta = delta * np.minimum(1, epsilon / length(delta))
        images = (clean + delta).clip(0, 1)
    return images


@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_steps_against_numpy(norm, momentum):
    weights, images, labels = random_weights("linear"), random_images(5), random_labels(5)
    epsilon, step_size = (0.1, 0.07) if norm == "linf" else (0.3, 0.2)
    for num_steps in (0, 1, 2):
        settings = {"num_steps": num_steps, "step_size": step_size, "momentum": momentum}
        attack = pgd(BALLS[norm](epsilon), start="none", **settings)
        function = partial(classify, weights)
        result = jax.jit(partial(attack, function))(images, labels, jax.random.key(0))
        expected = numpy_pgd(norm, weights, images, labels, epsilon, **settings)
        np.testing.assert_allclose(result, expected, atol=2e-6)


def rising(images):
    """Logits whose margin of class 1 grows by 2 with the sum of the pixels."""
    total = jnp.sum(images, axis=(1, 2, 3))
    return jnp.stack([-total, total], axis=1)


def test_a_schedule_of_step_sizes():
    images, labels = jnp.full((3, *SHAPE), 0.5), jnp.zeros(3, int)

    def attacked(step_size, num_steps=3):
        settings = {"loss": "margin", "start": "none", "step_size": step_size}
        attack = pgd(linf(0.3), num_steps=num_steps, **settings)
        return jax.jit(partial(attack, rising))(images, labels, jax.random.key(0))

    np.testing.assert_array_equal(attacked(lambda i: 0.07), attacked(0.07))
    # 0.1, 0.05 and 0.025, all of them upwards.
    found = attacked(lambda i: 0.1 / 2.0**i)
    np.testing.assert_allclose(found, 0.5 + 0.1 + 0.05 + 0.025, atol=1e-6)
    np.testing.assert_allclose(attacked(lambda i: 0.1 / 2.0**i, 1), 0.6, atol=1e-6)


def test_a_start_of_the_caller_s_own():
    images, labels = random_images(4), random_labels(4)
    given = (images + 0.05 * jax.random.normal(jax.random.key(3), images.shape)).clip(0, 1)
    given = images + (given - images).clip(-0.1, 0.1)

    def attacked(start, num_steps):
        attack = pgd(linf(0.1), num_steps=num_steps, step_size=0.02, start=start)
        function = partial(classify, random_weights("linear"))
        return jax.jit(partial(attack, function))(images, labels, jax.random.key(0))

    np.testing.assert_allclose(attacked(lambda *_: given, 0), given, atol=1e-7)
    far = np.abs(attacked(lambda *_: given, 1) - given)
    assert 0 < far.max() <= 0.02 + 1e-6
    # It is told the threat, the images and their keys, and cannot leave the ball.
    named = attacked("uniform", 0)
    np.testing.assert_allclose(attacked(uniform_start, 0), named, atol=1e-7)
    assert distance("linf", attacked(lambda t, x, k: x + 5, 0), images).max() <= 0.1 + 1e-6


@pytest.mark.parametrize("epsilon", [8 / 255, jnp.float32(8 / 255)])
def test_fgsm(epsilon):
    weights, images, labels = random_weights("linear"), random_images(5), random_labels(5)
    gradient = numpy_gradient(weights, images, labels)
    expected = np.clip(images + np.float32(epsilon) * np.sign(gradient), 0, 1)
    attack = fgsm(linf(epsilon))
    result = attack(partial(classify, weights), images, labels, jax.random.key(0))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_gradients_too_small_to_square_still_move_the_images():
    weights = [jnp.full((16, CLASSES), 1e-25).at[:, 0].set(-1e-25), *random_weights("constant")[1:]]
    images, labels = jnp.full((2, *SHAPE), 0.5), jnp.zeros(2, int)
    attack = pgd(l2(0.4), num_steps=1, step_size=0.4, start="none")
    result = attack(partial(classify, weights), images, labels, jax.random.key(0))
    np.testing.assert_allclose(distance("l2", result, images), 0.4, rtol=1e-5)


def test_not_a_number_hurts_neither_the_pixel_nor_the_next_step():
    """One image's gradient is not a number in the first step only."""

    def function(images):
        bad = (images[:, 0, 0, 0] == 0.5) & (images[:, 3, 3, 0] == 0.25)
        flat = images.reshape(len(images), -1)
        return jnp.where(bad[:, None], jnp.nan, 1.0) * flat[:, :2] ** 2

    images = jnp.full((2, *SHAPE), 0.5).at[0, 3, 3, 0].set(0.25)
    attack = pgd(linf(0.1), num_steps=3, step_size=0.05, start="none", momentum=0.5)
    result = attack(function, images, jnp.zeros(2, int), jax.random.key(0))
    assert np.all(np.isfinite(result))
    np.testing.assert_array_equal(result[0], images[0])
    np.testing.assert_allclose(result[1].ravel()[:2], [0.4, 0.6], atol=1e-6)


def test_start_of_trades():
    images = jnp.full((64, *SHAPE), 0.5)
    attack = pgd(linf(8 / 255), num_steps=0, step_size=0.01, loss="kl", start="gaussian")
    function = partial(classify, random_weights("mlp"))
    delta = attack(function, images, None, jax.random.key(0)) - images
    np.testing.assert_allclose(np.std(delta), 0.001, rtol=0.08)
    np.testing.assert_allclose(np.mean(delta), 0, atol=1e-4)


def test_an_image_is_attacked_alone():
    images, labels = random_images(6), random_labels(6)
    keys = jax.random.split(jax.random.key(1), 6)
    attack = pgd(l2(0.3), num_steps=3, step_size=0.1, restarts=2)
    run = jax.jit(partial(attack, partial(classify, random_weights("mlp"))))
    whole = run(images, labels, keys)
    some = jnp.array([4, 1, 5])
    np.testing.assert_allclose(
        run(images[some], labels[some], keys[some]), whole[some], rtol=1e-5, atol=1e-6
    )


def test_one_key_is_split_into_one_per_image():
    images, labels = random_images(4), random_labels(4)
    attack = pgd(linf(0.1), num_steps=1, step_size=0.01)
    run = jax.jit(partial(attack, partial(classify, random_weights("mlp"))))
    one = run(images, labels, jax.random.key(3))
    split = run(images, labels, jax.random.split(jax.random.key(3), 4))
    np.testing.assert_array_equal(one, split)
    np.testing.assert_array_equal(one, run(images, labels, jax.random.PRNGKey(3)))
    assert np.any(one != run(images, labels, jax.random.key(4)))


def test_more_restarts_never_find_a_weaker_image():
    loss = "margin"
    images, labels = random_images(32), random_labels(32)
    function = partial(classify, random_weights("mlp"))
    previous, improved = None, False
    for restarts in (1, 3):
        attack = pgd(linf(0.1), num_steps=2, step_size=0.02, loss=loss, restarts=restarts)
        outputs = function(jax.jit(partial(attack, function))(images, labels, jax.random.key(0)))
        value = np.asarray(make_loss(loss).value(outputs, labels))
        fooled = np.asarray(make_loss(loss).fooled(outputs, labels))
        if previous is not None:
            assert np.all(fooled >= previous[1])
            same = fooled == previous[1]
            assert np.all(value[same] >= previous[0][same] - 1e-5)
            improved |= np.any(value > previous[0] + 1e-3)
        previous = value, fooled
    assert improved


def test_success_beats_loss_between_restarts():
    """The loss prefers bright images, success needs dark ones."""
    prefer = Loss(lambda out, _: out[:, 0], lambda out, _: out[:, 0] < 0.5)
    images = jnp.full((16, 1, 1, 1), 0.5)
    attack = pgd(linf(0.2), num_steps=0, step_size=0.1, loss=prefer, restarts=20)
    result = attack(lambda x: x.reshape(-1, 1), images, random_labels(16), jax.random.key(0))
    assert np.all(result < 0.5)
    # Among those that succeed the highest loss wins.
    assert np.mean(result) > 0.46


def test_clean_outputs_may_be_given():
    images = random_images(4)
    function = partial(classify, random_weights("mlp"))
    attack = pgd(linf(0.1), num_steps=2, step_size=0.05, loss="kl", start="gaussian")
    run = jax.jit(partial(attack, function))
    computed = run(images, None, jax.random.key(0))
    np.testing.assert_array_equal(run(images, None, jax.random.key(0), function(images)), computed)
    assert np.mean(np.abs(computed - images)) > 0.05
    # They are used: from other outputs the attack leads elsewhere.
    other = run(images, None, jax.random.key(0), function(1 - images))
    assert np.any(np.abs(other - computed) > 0.05)


def test_joint_attack_maximises_the_sum():
    images, weights = random_images(4), [random_weights("mlp", s) for s in range(2)]

    def joint(x):
        return classify(weights[0], x), classify(weights[1], x)[:, :2]

    def summed(outputs, clean):
        return kl(outputs[0], clean[0]) + kl(outputs[1], clean[1])

    def attack(loss):
        settings = {"num_steps": 3, "step_size": 0.05, "start": "gaussian"}
        run = jax.jit(partial(pgd(l2(0.3), loss=loss, **settings), joint))
        return run(images, None, jax.random.key(0))

    by_hand = attack(Loss(summed, make_loss("kl").fooled, against_clean=True))
    np.testing.assert_allclose(attack("kl"), by_hand, atol=1e-6)
    assert np.mean(summed(joint(by_hand), joint(images))) > 0.01


@pytest.mark.parametrize("restarts", [1, 2])
def test_no_gradient_flows_through_an_attack(restarts):
    attack = pgd(l2(0.3), num_steps=1, step_size=0.05, start="none", restarts=restarts)

    def moved(weights, images):
        function = partial(classify, weights)
        return jnp.sum(attack(function, images, random_labels(3), jax.random.key(0)))

    gradients = jax.jit(jax.grad(moved, argnums=(0, 1)))(random_weights("mlp"), random_images(3))
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


@pytest.fixture(scope="module")
def digits():
    """A small trained classifier of real images: (function, images, labels)."""
    data = load_digits()
    images = jnp.asarray(data.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(data.target)
    rng = np.random.default_rng(0)
    params = [
        jnp.asarray(rng.normal(size=shape) / 8, jnp.float32) for shape in [(64, 32), (32, 10)]
    ]

    def function(params, x):
        return jax.nn.relu((x - 0.5).reshape(len(x), 64) @ params[0]) @ params[1]

    def loss(params):
        return jnp.mean(cross_entropy(function(params, images[:1400]), labels[:1400]))

    optimizer = optax.adam(0.01)

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 150, step, (params, optimizer.init(params)))[0]

    params = train(params)
    function = jax.jit(partial(function, params))
    images, labels = images[1400:1656], labels[1400:1656]
    assert np.mean(np.argmax(function(images), axis=1) == labels) > 0.85
    return function, images, labels


@pytest.mark.parametrize("norm", BALLS)
def test_more_steps_attack_better(digits, norm):
    function, images, labels = digits
    epsilon = 0.15 if norm == "linf" else 0.8
    losses, accuracies = [], []
    for num_steps in (1, 5, 20):
        settings = {"num_steps": num_steps, "step_size": epsilon / 4, "start": "none"}
        attack = pgd(BALLS[norm](epsilon), **settings)
        adversarial = jax.jit(partial(attack, function))(images, labels, jax.random.key(0))
        logits = function(adversarial)
        losses.append(float(jnp.mean(cross_entropy(logits, labels))))
        accuracies.append(float(jnp.mean(jnp.argmax(logits, axis=1) == labels)))
    assert losses[0] < losses[1] < losses[2]
    assert accuracies[2] < accuracies[0] and accuracies[2] < 0.45


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "margin", "dlr", pytest.param("kl", id="kl, no labels")]
)
def test_every_loss_fools_a_trained_network(digits, loss):
    function, images, labels = digits
    start = "gaussian" if loss == "kl" else "none"
    attack = pgd(linf(0.15), num_steps=10, step_size=0.04, loss=loss, start=start)
    given = None if loss == "kl" else labels
    adversarial = jax.jit(partial(attack, function))(images, given, jax.random.key(0))
    accuracy = np.mean(np.argmax(function(adversarial), axis=1) == labels)
    assert accuracy < 0.5 * np.mean(np.argmax(function(images), axis=1) == labels)


@pytest.mark.parametrize(
    ("norm", "restarts", "momentum"),
    [
        pytest.param("linf", 3, 0.9, marks=pytest.mark.slow),
        pytest.param("l2", 1, 0.9, marks=pytest.mark.slow),
        ("linf", 1, 0.0),
        pytest.param("l2", 3, 0.0, marks=pytest.mark.slow),
    ],
)
def test_the_same_under_every_transformation(norm, restarts, momentum):
    images, labels = random_images(16), random_labels(16)
    keys = jax.random.split(jax.random.key(0), 16)
    settings = {"num_steps": 3, "step_size": 0.05, "momentum": momentum, "restarts": restarts}
    start = "uniform" if restarts > 1 else "none"  # drawing takes most of the time to compile
    attack = pgd(BALLS[norm](0.1), start=start, **settings)

    def run(images, labels, keys):
        return attack(partial(classify, random_weights("mlp")), images, labels, keys)

    def sharded(check_vma):
        d = P("data")
        mesh = data_mesh(8)
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=d, out_specs=d, check_vma=check_vma))

    def by_device(mapped):
        def call(*args):
            parts = mapped(*(a.reshape(8, 2, *a.shape[1:]) for a in args))
            return parts.reshape(images.shape)

        return call

    plain = run(images, labels, keys)
    assert np.all(distance(norm, plain, images) > 0.05)
    for name, transformed in {
        "jit": jax.jit(run),
        "vmap": by_device(jax.jit(jax.vmap(run))),
        "shard_map, check_vma": sharded(True),
        "shard_map": sharded(False),
        "pmap": by_device(jax.pmap(run)),
    }.items():
        result = transformed(images, labels, keys)
        np.testing.assert_allclose(result, plain, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.slow), False])
def test_convolutions_are_attacked_the_same_in_shards(check_vma):
    images, labels = random_images(8), random_labels(8)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1, CLASSES)), jnp.float32)
    attack = pgd(linf(0.1), num_steps=2, step_size=0.05, restarts=2)

    def run(kernel, images, labels, keys):
        def function(x):
            return jnp.mean(jnp.tanh(conv2d(x, kernel, padding=1)), axis=(1, 2))

        return attack(function, images, labels, keys)

    d = P("data")
    mapped = jax.shard_map(
        run, mesh=data_mesh(8), in_specs=(P(), d, d, d), out_specs=d, check_vma=check_vma
    )
    args = kernel, images, labels, jax.random.split(jax.random.key(0), 8)
    np.testing.assert_allclose(jax.jit(mapped)(*args), jax.jit(run)(*args), atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is unknown"),
        ({"start": "center"}, "start 'center' is unknown; choose one of none, uniform, gaussian"),
        ({"step_size": 0}, "step_size=0 must be positive"),
        ({"step_size": -0.1}, "step_size=-0.1 must be positive"),
        ({"num_steps": -1}, "num_steps=-1"),
        ({"restarts": 0}, "restarts=0"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        pgd(linf(0.1), **({"num_steps": 1, "step_size": 0.1} | settings))


def test_a_seed_is_a_key():
    attack = pgd(linf(0.1), num_steps=2, step_size=0.05)
    args = partial(classify, random_weights("mlp")), random_images(4), random_labels(4)
    np.testing.assert_array_equal(attack(*args, 5), attack(*args, jax.random.key(5)))
    for seed, said in ((-1, "from 0 to"), (2**32, "from 0 to"), ("one", "the key is 'one'")):
        with pytest.raises(ValueError, match=said):
            attack(*args, seed)


def test_a_start_of_ones_own():
    """Images as a start are projected, and no step is taken from elsewhere."""
    threat, images = linf(0.1), random_images(4)
    start = jnp.clip(images + 0.3, 0, 1)
    args = partial(classify, random_weights("mlp")), images, random_labels(4), 0
    found = pgd(threat, num_steps=0, step_size=0.05, start=start)(*args)
    np.testing.assert_allclose(found, jnp.clip(images + 0.1, 0, 1), atol=1e-6)
    by_function = pgd(threat, num_steps=3, step_size=0.05, start=lambda *_: start)(*args)
    by_images = pgd(threat, num_steps=3, step_size=0.05, start=np.asarray(start))(*args)
    np.testing.assert_array_equal(by_images, by_function)
    with pytest.raises(ValueError, match=r"the start is \(2, .* the images are \(4, "):
        pgd(threat, num_steps=1, step_size=0.05, start=start[:2])(*args)


def test_wrong_number_of_keys():
    attack = pgd(linf(0.1), num_steps=1, step_size=0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"\(3,\) keys given for 4 images: give one key or 4"):
        attack(partial(classify, random_weights("mlp")), random_images(4), random_labels(4), keys)


def test_draws_that_compare_restarts_are_not_those_that_began_them():
    clean, epsilon = np.full((4, 3, 3, 1), 0.5, np.float32), 0.1

    def off_its_noise(images, keys):
        drawn = jax.vmap(lambda k: jax.random.uniform(k, (3, 3, 1), jnp.float32, -1, 1))(keys)
        missed = jnp.abs(images - clean - epsilon * drawn).max(axis=(1, 2, 3))
        return jnp.stack([jnp.zeros_like(missed), missed], axis=1)

    def least(restarts):
        seen = []

        def function(images, keys):
            logits = off_its_noise(images, keys)
            jax.debug.callback(lambda v: seen.append(float(v.min())), logits[:, 1])
            return logits

        attack = pgd(linf(epsilon), num_steps=0, step_size=0.1, restarts=restarts, eot_samples=2)
        attack(function, clean, np.zeros(4, np.int32), jax.random.key(0))
        jax.effects_barrier()
        return min(seen)

    assert least(6) > 1e-3


def test_a_seed_may_be_an_array():
    images, labels = random_images(2), random_labels(2)
    attack = pgd(linf(0.1), num_steps=1, step_size=0.05)
    function = partial(classify, random_weights("linear"))
    one, other = (attack(function, images, labels, seed) for seed in (3, jnp.int32(3)))
    np.testing.assert_array_equal(one, other)
