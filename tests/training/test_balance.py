"""Balancing losses against NumPy, noise, random routes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from advmoe_jax.errors import UserError
from advmoe_jax.parallel import DATA_AXIS, data_mesh, parallel
from advmoe_jax.routing.choice import choose
from advmoe_jax.training import balance
from advmoe_jax.training.balance import Balance, Noise, balancing_loss

SIGMA = 0.5


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(scores, drawn, top_k):
    """name -> loss of scores [B, N], the arithmetic written out."""
    p = softmax(scores)
    count, experts = scores.shape
    importance = [sum(p[b][e] for b in range(count)) for e in range(experts)]
    noisy = scores + SIGMA * drawn
    load, chosen = [0.0] * experts, [0] * experts
    for b in range(count):
        threshold = sorted(noisy[b])[-top_k]
        for e in range(experts):
            load[e] += 0.5 * (1 + math.erf((scores[b][e] - threshold) / SIGMA / math.sqrt(2)))
        for e in np.argsort(noisy[b])[-top_k:]:
            chosen[e] += 1
    mean = np.array(importance) / count
    return {
        "importance": np.var(importance) / np.mean(importance) ** 2,
        "load": np.var(load) / np.mean(load) ** 2,
        "switch": experts * sum(c / (count * top_k) * m for c, m in zip(chosen, mean, strict=True)),
        "entropy": math.log(experts) + sum(m * math.log(m) for m in mean),
    }


def draws(*shape):
    rng = np.random.default_rng(0)
    return 2 * rng.normal(size=shape), rng.normal(size=shape)


def one_loss(name, scores, drawn, top_k, axis_name=None):
    """Of scores [B, N], one decision, or [B, D, N]."""
    settings = Balance(**{name: 3.0}, noise=SIGMA)
    scores, drawn = (jnp.asarray(x).reshape(len(x), -1, np.shape(x)[-1]) for x in (scores, drawn))
    noise = Noise(SIGMA * jnp.asarray(drawn, jnp.float32), jnp.asarray(drawn, jnp.float32))
    routing = choose(jnp.asarray(scores, jnp.float32), top_k, noise=noise.added)
    return balancing_loss(settings, routing, noise, axis_name)


LOSSES = ("importance", "load", "switch", "entropy")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_are_the_papers(name, top_k):
    scores, drawn = draws(16, 3)
    expected = 3.0 * by_hand(scores, drawn, top_k)[name]
    assert one_loss(name, scores, drawn, top_k) == pytest.approx(expected, rel=1e-5)
    # Of several layers: the mean.
    scores, drawn = draws(16, 2, 3)
    of_layers = [by_hand(scores[:, i], drawn[:, i], top_k)[name] for i in range(2)]
    found = one_loss(name, scores, drawn, top_k)
    assert found == pytest.approx(3.0 * np.mean(of_layers), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_least_where_the_load_is_even(name):
    drawn = np.zeros((4, 2))
    even = one_loss(name, [[5.0, 0], [0, 5.0], [5.0, 0], [0, 5.0]], drawn, 1)
    assert even == pytest.approx(3.0 if name == "switch" else 0.0, abs=1e-6)
    assert one_loss(name, [[5.0, 0], [5.0, 0], [5.0, 0], [0, 5.0]], drawn, 1) > even + 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_eight_devices_are_of_the_whole_batch(name):
    scores, drawn = draws(16, 3)

    def local(scores, drawn):
        loss, gradient = jax.value_and_grad(
            lambda w: one_loss(name, scores * w, drawn, 1, DATA_AXIS)
        )(jnp.ones(3))
        return loss, jax.lax.pmean(gradient, DATA_AXIS)

    spread = PartitionSpec(DATA_AXIS)
    of_eight = parallel(local, data_mesh(8), in_specs=(spread, spread))(scores, drawn)
    of_one = jax.value_and_grad(lambda w: one_loss(name, scores * w, drawn, 1))(jnp.ones(3))
    for found, expected in zip(of_eight, of_one, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(of_one[1]).max() > 1e-3


def test_noise_changes_the_choice_and_nothing_else():
    scores = jnp.asarray([[1.0, 0.0], [1.0, 0.0]])
    noise = jnp.asarray([[0.0, 0.5], [0.0, 1.5]])
    routing = choose(scores, gate="softmax", noise=noise)
    np.testing.assert_array_equal(routing.indices, [[0], [1]])
    np.testing.assert_array_equal(routing.scores, scores)
    np.testing.assert_allclose(routing.weights, [[1 / (1 + 1 / np.e)], [1 / (1 + np.e)]], rtol=1e-6)


def test_routes_are_uniform_during_the_warm_up_and_noisy_after_it():
    settings = Balance(noise=SIGMA, warmup_steps=3)
    keys = jax.random.split(jax.random.key(0), 3000)
    scores = jnp.asarray([[50.0, 0.0, 0.0]]).repeat(3000, 0)
    early, late = (balance.draw(settings, keys, jnp.int32(step), (3,)) for step in (2, 3))
    chosen = np.bincount(choose(scores, noise=early.added).indices[:, 0], minlength=3)
    assert np.abs(chosen - 1000).max() < 5 * math.sqrt(3000 * 2 / 9)  # five standard deviations
    assert set(np.asarray(choose(scores, noise=late.added).indices[:, 0])) == {0}
    assert float(jnp.std(late.added)) == pytest.approx(SIGMA, rel=0.05)
    np.testing.assert_array_equal(late.added, SIGMA * late.normal)


def test_a_share_of_the_images_takes_random_routes_in_every_step():
    settings = Balance(random_share=0.3)
    scores = jnp.asarray([[50.0, 0.0]]).repeat(3000, 0)
    chosen = []
    for step in range(2):
        keys = jax.random.split(jax.random.key(step), 3000)
        drawn = balance.draw(settings, keys, jnp.int32(step), (2,))
        chosen.append(np.asarray(choose(scores, noise=drawn.added).indices[:, 0]))
    # Half of the random ones go where the router would send them.
    assert [x.mean() for x in chosen] == pytest.approx([0.15, 0.15], abs=0.03)
    assert (chosen[0] != chosen[1]).any()
    assert not balance.draw(Balance(noise=0.0), keys, jnp.int32(0), (2,)).added.any()


def test_load_needs_noise():
    with pytest.raises(UserError, match=r"^balance\.load needs score noise.* set balance\.noise"):
        balance.check(Balance(load=0.1), "softmax")
    balance.check(Balance(load=0.1, noise=0.5), "softmax")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shared_steps_descend_on_a_common_kernel_and_on_an_experts_own(share):
    rng = np.random.default_rng(0)
    common, own, target = (rng.normal(size=(x, 4)).astype(np.float32) for x in (1, 3, 3))
    bias = rng.normal(size=4).astype(np.float32)

    def loss(kernels, bias):
        return jnp.sum(jnp.sin(kernels * target + bias))

    apart = jax.grad(lambda common, own: loss(common + own, bias), (0, 1))(common, own)
    stepped = (common - 0.1 * share * apart[0]) + (own - 0.1 * (1 - share) * apart[1])

    params = {"kernel": common + own, "bias": jnp.asarray(bias)}
    gradients = jax.grad(lambda p: loss(p["kernel"], p["bias"]))(params)
    stacked = {"kernel": True, "bias": False}
    shared = balance.share_steps(gradients, stacked, share)
    np.testing.assert_allclose(params["kernel"] - 0.1 * shared["kernel"], stepped, atol=1e-6)
    np.testing.assert_array_equal(shared["bias"], gradients["bias"])


def test_random_routes_are_no_weights_of_the_published_gate():
    with pytest.raises(UserError, match=r"^balance\.warmup_epochs .*set it to 0, or model\.gate"):
        balance.check(Balance(warmup_steps=1), "noisy_softmax")
    with pytest.raises(UserError, match=r"^balance\.random_share .*set it to 0, or model\.gate"):
        balance.check(Balance(random_share=0.1), "noisy_softmax")
    balance.check(Balance(warmup_steps=1, random_share=0.1), "softmax")


def test_where_tokens_decide_they_count_layer_by_layer():
    scores = jax.random.normal(jax.random.key(0), (6, 2 * 5, 3))  # two layers of five tokens
    normal = jax.random.normal(jax.random.key(1), scores.shape)
    settings = Balance(importance=0.3, load=0.2, switch=0.1, entropy=0.4, noise=0.5)
    routing = choose(scores, 2, "noisy_softmax", noise=0.5 * normal)
    whole = balance.balancing_loss(
        settings, routing, balance.Noise(0.5 * normal, normal), routers=2
    )
    by_layer = []
    for layer in range(2):
        # As if every token were an image with one decision.
        def alone(x, layer=layer):
            return x[:, 5 * layer : 5 * layer + 5].reshape(30, 1, *x.shape[2:])

        of_layer, drawn = jax.tree.map(alone, (routing, normal))
        noise = Noise(0.5 * drawn, drawn)
        by_layer.append(balancing_loss(settings, of_layer, noise))
    np.testing.assert_allclose(whole, np.mean(by_layer), rtol=1e-5)
