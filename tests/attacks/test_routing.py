"""Attacks on a mixture of experts, on functions small enough to know the answer by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import (
    Answer,
    Routed,
    gate_attack,
    joint_attack,
    linf,
    moe_suite,
    pathways,
    pgd,
    route_attack,
    through_gate,
    worst_pathway,
)

EPSILON = 0.05
THREAT = linf(EPSILON)
PIXELS = (2, 2, 2)
RNG = np.random.default_rng(0)
# Away from the ends of the range, so that only the ball limits the attacker.
IMAGES = RNG.uniform(0.3, 0.7, (24, *PIXELS)).astype(np.float32)
KEY = jax.random.key(0)


def mixture(scores_of, experts, top_k=1):
    """Experts as functions flat -> logits; ``scores_of`` flat -> [B, N]."""

    def flat(images):
        return images.reshape(len(images), -1) - 0.5

    def everyone(images):
        return jnp.stack([expert(flat(images)) for expert in experts], axis=1)

    def weigh(scores):
        indices = jax.lax.top_k(scores, top_k)[1]
        return jnp.sum(jax.nn.one_hot(indices, len(experts)), axis=-2)

    def mix(images, weights):
        return jnp.einsum("bn,bnk->bk", weights, everyone(images))

    def follow(images, indices):
        return mix(images, jnp.sum(jax.nn.one_hot(indices, len(experts)), axis=-2))

    def classify(images):
        scores = scores_of(flat(images))
        indices = jax.lax.top_k(scores, top_k)[1]
        return Answer(follow(images, indices), scores, indices)

    return Routed(classify, follow, mix, weigh)


ROUTER = jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32)


def constant(*logits):
    return lambda flat: jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(flat), len(logits)))


@pytest.fixture(scope="module")
def masked():
    """Expert 0 says 0 whatever it sees, expert 1 says 1; nothing but the route can be attacked.

    The function, images that expert 0 sees, and which of them can be sent to expert 1: linear
    scores move by at most epsilon times the l1 norm of the difference of their weights.
    """
    function = mixture(lambda flat: 100 * (flat @ ROUTER), [constant(2, 0), constant(0, 2)])
    flat = IMAGES.reshape(len(IMAGES), -1).astype(np.float64) - 0.5
    slope = np.asarray(ROUTER[:, 1] - ROUTER[:, 0], np.float64)
    gap = flat @ slope
    mine = gap < 0
    reachable = gap[mine] + EPSILON * np.abs(slope).sum() > 0
    assert 2 < reachable.sum() < mine.sum() - 2
    return function, jnp.asarray(IMAGES[mine]), reachable


def fooled_by(attack, function, images, labels):
    found = jax.jit(partial(attack, function))(images, labels, KEY)
    assert np.abs(found - images).max() <= EPSILON * (1 + 1e-5)
    return np.asarray(jnp.argmax(function(found), axis=1) != labels)


@pytest.mark.parametrize(
    "attack",
    [
        route_attack(THREAT, num_steps=20),
        joint_attack(THREAT, num_steps=20),
        gate_attack(THREAT, "straight_through", num_steps=20),
        gate_attack(THREAT, "softmax", num_steps=20),
    ],
    ids=["route", "joint", "straight_through", "softmax"],
)
def test_a_route_that_gradients_do_not_see(masked, attack):
    """Every image within reach is found, and no other; the loss's own gradient finds none."""
    function, images, reachable = masked
    labels = jnp.zeros(len(images), int)
    np.testing.assert_array_equal(fooled_by(attack, function, images, labels), reachable)
    blind = pgd(THREAT, num_steps=20, step_size=0.02, start="none")
    assert not fooled_by(blind, function, images, labels).any()


def test_pathways_within_reach(masked):
    function, images, reachable = masked
    labels = jnp.zeros(len(images), int)
    found = jax.jit(partial(worst_pathway(THREAT, num_steps=5), function))(images, labels, KEY)
    assert found.routes.shape == (len(images), 3, 1)
    np.testing.assert_array_equal(found.robust, ~reachable)
    # The first route is the clean one, which nothing fools here.
    assert not found.routes[:, 0].any() and not found.fooled[:, 0].any()
    np.testing.assert_array_equal((found.routes == 1).any(axis=(1, 2)), reachable)
    frozen = worst_pathway(THREAT, num_steps=5, frozen=True)
    assert jax.jit(partial(frozen, function))(images, labels, KEY).robust.all()


def test_a_pathway_that_errs_only_where_the_network_leaves_it():
    """Expert 0 is wrong on bright images, which the router sends to expert 1, who is right."""
    bright = jnp.ones(8) / 8

    def expert(flat):
        return jnp.stack([jnp.zeros(len(flat)), 50 * (flat @ bright)], axis=1)

    function = mixture(
        lambda flat: jnp.stack([-(flat @ bright), flat @ bright], axis=1), [expert, constant(2, 0)]
    )
    images, labels = jnp.full((3, *PIXELS), 0.48), jnp.zeros(3, int)
    found = jax.jit(partial(worst_pathway(THREAT, frozen=True), function))(images, labels, KEY)
    assert not found.robust.any() and not found.network_fooled.any()
    logits = function.follow(found.adversarial, found.routes[:, 0])
    assert np.all(np.argmax(logits, axis=1) == 1) and np.all(function(images)[:, 0] >= 0)
    # Over any number of images the same, and both judges are told.
    result = pathways(THREAT, num_steps=10, frozen=True)(
        function, images, labels, KEY, batch_size=3, progress=False
    )
    assert result.robust_accuracy == 0 and result.network_accuracy == 1
    assert set(result.fooled_by) == {"frozen_route"}
    np.testing.assert_array_equal(result.network_robust, True)


def suite(function, images, labels, **settings):
    run = moe_suite(THREAT, num_steps=10, search_steps=10, eot_samples=2)
    return run(function, images, labels, KEY, **({"batch_size": 4, "progress": False} | settings))


def random_mixture(top_k=1):
    """Three linear experts of three classes."""
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 8, 3)), jnp.float32)
    router = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)), jnp.float32)
    experts = [partial(jnp.matmul, b=w) for w in weights]
    return mixture(lambda flat: flat @ router, [lambda x, e=e: e(x) for e in experts], top_k)


def test_the_suite_is_the_minimum_over_all():
    function = random_mixture()
    labels = np.array(jnp.argmax(function(IMAGES), axis=1))
    labels[0] = (labels[0] + 1) % 3
    result = suite(function, IMAGES, labels)
    assert result.fooled_by[0] == "clean" and result.clean_accuracy == pytest.approx(23 / 24)
    assert 0 < result.robust_accuracy < result.clean_accuracy
    np.testing.assert_array_equal(result.robust, result.fooled_by == "")
    assert np.all(result.network_robust >= result.robust)
    names = ["route", "joint", "straight_through", "softmax_gate", "frozen_route", "worst_pathway"]
    assert list(result.attacks) == names
    left = 23
    for name, report in result.attacks.items():
        assert report.tried == left and report.fooled == np.sum(result.fooled_by == name)
        left -= report.fooled
        assert report.accuracy == pytest.approx(left / 24)
    # By a plain forward pass outside of jit, and by NumPy.
    assert np.abs(result.adversarial - IMAGES).max() <= EPSILON * (1 + 1e-5)
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    with jax.disable_jit():
        logits = np.asarray(function(jnp.asarray(result.adversarial)))
    right = np.argmax(logits, axis=1) == labels
    np.testing.assert_array_equal(right, result.network_robust)
    # The same, whatever the batches.
    again = suite(function, IMAGES, labels, batch_size=24)
    np.testing.assert_array_equal(again.fooled_by, result.fooled_by)


def test_killed_and_resumed(tmp_path):
    function, file = random_mixture(), tmp_path / "state.npz"
    labels, calls = np.asarray(jnp.argmax(function(IMAGES), axis=1)), []
    run = pathways(THREAT, num_steps=5, search_steps=5)

    def attack(limit, **settings):
        def compile(function):
            compiled = jax.jit(function)

            def call(*args):
                calls.append(1)
                if len(calls) > limit:
                    raise KeyboardInterrupt
                return compiled(*args)

            return call

        calls.clear()
        settings |= {"batch_size": 4, "progress": False, "compile": compile}
        return run(function, IMAGES, labels, KEY, **settings)

    whole = attack(6)
    with pytest.raises(KeyboardInterrupt):
        attack(4, state_file=file)
    resumed = attack(2, state_file=file)
    np.testing.assert_array_equal(resumed.fooled_by, whole.fooled_by)
    np.testing.assert_array_equal(resumed.adversarial, whole.adversarial)
    assert attack(0, state_file=file).robust_accuracy == whole.robust_accuracy
    with pytest.raises(ValueError, match="of another evaluation"):
        run(function, IMAGES, labels, jax.random.key(1), batch_size=4, state_file=file)


def test_a_closure_is_traced_anew_at_every_call():
    says = {1: constant(2, 0)}  # what expert 1 says; both say 0 at first
    function = mixture(lambda flat: 9 * (flat @ ROUTER), [constant(2, 0), lambda x: says[1](x)])
    images = IMAGES[np.argmax(function.classify(IMAGES).scores, axis=1) == 0]
    run = partial(pathways(THREAT, num_steps=2, search_steps=10), progress=False, batch_size=24)
    labels = np.zeros(len(images), int)
    assert run(function, images, labels, KEY).robust.all()
    says[1] = constant(0, 2)
    assert 0 < run(function, images, labels, KEY).robust_accuracy < 1


def test_noise_draws_routes_by_a_softmax_of_the_scores():
    scores = np.array([0.0, 0.6, 1.0])
    function = mixture(
        lambda flat: jnp.broadcast_to(jnp.asarray(scores), (len(flat), 3)),
        [constant(*row) for row in np.eye(3)],
    )
    keys = jax.random.split(KEY, 4000)
    hard = through_gate(function, "hard", noise=0.5)
    shares = np.mean(jax.jit(hard)(jnp.zeros((4000, *PIXELS)), keys), axis=0)
    expected = np.exp(scores / 0.5) / np.exp(scores / 0.5).sum()
    np.testing.assert_allclose(shares, expected, atol=0.03)


def test_gates_without_noise_against_numpy():
    weights = np.random.default_rng(3).normal(size=(3, 8, 3)).astype(np.float32)
    function = random_mixture()
    keys = jax.random.split(KEY, len(IMAGES))
    answer = function.classify(jnp.asarray(IMAGES))
    flat = IMAGES.reshape(len(IMAGES), -1) - 0.5
    each = np.einsum("bi,nik->bnk", flat, weights)
    scores = np.asarray(answer.scores, np.float64)
    scaled = scores / (0.5 * np.ptp(scores, axis=1, keepdims=True))
    soft = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)

    def gate(name):
        return through_gate(function, name, noise=0.0, temperature=0.5)

    for name in ("hard", "straight_through"):
        np.testing.assert_allclose(gate(name)(IMAGES, keys), answer.logits, atol=1e-5)
    np.testing.assert_allclose(
        gate("softmax")(IMAGES, keys), np.einsum("bn,bnk->bk", soft, each), atol=1e-5
    )

    def gradient(of):
        return np.asarray(jax.grad(lambda x: jnp.sum(of(x)[:, 0]))(jnp.asarray(IMAGES)))

    true = gradient(function)
    np.testing.assert_allclose(gradient(lambda x: gate("hard")(x, keys)), true, atol=1e-5)
    # Beyond the true gradient, what the route would be worth: the derivative of the softmax.
    beyond = gradient(lambda x: gate("straight_through")(x, keys)) - true

    def worth(x):
        fixed = jnp.asarray(each[..., 0])
        here = function.classify(x).scores
        span = jnp.asarray(np.ptp(scores, axis=1, keepdims=True), jnp.float32)
        return jnp.sum(jax.nn.softmax(here / (0.5 * span)) * fixed)

    by_hand = jax.grad(worth)(jnp.asarray(IMAGES))
    np.testing.assert_allclose(beyond, by_hand, atol=1e-4)
    assert np.abs(beyond).max() > 1e-2


def two_decisions():
    """Two decisions of three experts each, of which two are followed; logits add up."""
    router = jnp.asarray(np.random.default_rng(5).normal(size=(8, 2, 3)), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(2, 3, 8, 4)), jnp.float32)

    def flat(x):
        return x.reshape(len(x), -1) - 0.5

    def weigh(scores):
        return jnp.sum(jax.nn.one_hot(jax.lax.top_k(scores, 2)[1], 3), axis=-2)

    def mix(x, w):
        return jnp.einsum("bln,lnik,bi->bk", w, weights, flat(x))

    def follow(x, indices):
        return mix(x, jnp.sum(jax.nn.one_hot(indices, 3), axis=-2))

    def classify(x):
        scores = jnp.einsum("bi,iln->bln", flat(x), router)
        indices = jax.lax.top_k(scores, 2)[1]
        return Answer(follow(x, indices), scores, indices)

    return Routed(classify, follow, mix, weigh)


def test_several_decisions_of_several_choices():
    function = two_decisions()
    images, labels = jnp.asarray(IMAGES), jnp.argmax(function(IMAGES), axis=1)
    found = jax.jit(partial(worst_pathway(THREAT, num_steps=5), function))(images, labels, KEY)
    assert found.routes.shape == (24, 4, 2, 2) and found.fooled.shape == (24, 4)
    moved = np.any(found.routes != found.routes[:, :1], axis=(2, 3))
    assert moved.sum() > 5 and found.fooled[moved].any()
    np.testing.assert_array_equal(
        found.network_fooled, np.argmax(function(found.adversarial), axis=1) != labels
    )
    before = np.sort(function.classify(images).indices)
    np.testing.assert_array_equal(found.routes[:, 0], before)
    rerouted = jax.jit(partial(route_attack(THREAT, num_steps=10), function))(images, labels, KEY)
    after = np.sort(function.classify(rerouted).indices)
    assert np.mean(np.any(after != before, axis=(1, 2))) > 0.5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gate_attack(THREAT, "sigmoid"), "gate 'sigmoid' is unknown; choose one of"),
        (lambda: gate_attack(THREAT, eot_samples=0), "eot_samples=0 must be positive"),
        (lambda: gate_attack(THREAT, loss="kl"), "compare with labels"),
        (lambda: gate_attack(THREAT, temperature=0.0), "temperature=0.0 positive"),
        (lambda: route_attack(THREAT, num_steps=0), "num_steps=0"),
        (lambda: worst_pathway(THREAT, search_steps=0), "num_steps=0"),
        (
            lambda: route_attack(THREAT)(random_mixture(3), IMAGES, np.zeros(24, int), KEY),
            "every one of the 3 experts is always chosen: there is no route to change",
        ),
        (
            lambda: pathways(THREAT)(
                random_mixture(), IMAGES, np.zeros(24, int), KEY, batch_size=3, batch_multiple=2
            ),
            "batch_size=3 must be a positive multiple of 2",
        ),
    ],
)
def test_wrong_settings(make, words):
    with pytest.raises(ValueError, match=words):
        make()
