"""A network as functions: each agrees with the network, in every scope, choice and gate."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import Routed, linf, worst_pathway
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.evaluation.views import routed, whole
from advmoe_jax.parallel import data_mesh, replicate
from advmoe_jax.routing.choice import Routing

SETTINGS = [
    {"num_experts": 3},
    {"num_experts": 3, "top_k": 2, "gate": "softmax"},
    {"num_experts": 3, "top_k": 2, "scope": "per_layer"},
    {"num_experts": 2, "gate": "softmax", "scope": "per_layer"},
]


@pytest.fixture(scope="module")
def images():
    # Dark and bright ones, which the routers tell apart.
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0, 0.3, (8, 8, 8, 1)) + rng.uniform(0, 0.7, (8, 1, 1, 1))
    return jnp.asarray(pixels, jnp.float32)


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS[0],
        pytest.param(SETTINGS[1], marks=pytest.mark.slow),
        pytest.param(SETTINGS[2], marks=pytest.mark.slow),
        SETTINGS[3],
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_functions_agree_with_the_network(tiny, images, settings):
    network, params, stats = tiny(**settings)
    function = routed(network, params, stats)
    output = jax.jit(lambda x: network.apply(params, stats, x)[0])(images)
    answer = function.classify(images)
    np.testing.assert_array_equal(answer.indices, output.routing.indices)
    np.testing.assert_allclose(answer.logits, output.logits, atol=1e-5)
    np.testing.assert_allclose(answer.scores, output.routing.scores, atol=1e-5)
    np.testing.assert_allclose(function(images), output.logits, atol=1e-5)
    # The network's own route and weights, forced upon it, change nothing.
    np.testing.assert_allclose(function.follow(images, answer.indices), output.logits, atol=1e-5)
    weights = function.weigh(answer.scores)
    np.testing.assert_allclose(function.mix(images, weights), output.logits, atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights), np.asarray(answer.indices), -1),
        output.routing.weights,
        atol=1e-6,
    )
    assert np.all(np.count_nonzero(weights, axis=-1) == settings.get("top_k", 1))
    # Another route is followed, too.
    other = (answer.indices + 1) % network.num_experts
    assert jnp.abs(function.follow(images, other) - output.logits).max() > 1e-3
    assert np.abs(jax.grad(lambda w: jnp.sum(function.mix(images, w)[:, 0]))(weights)).min() > 0


def test_another_route_is_that_of_a_forced_network(tiny, images):
    network, params, stats = tiny(num_experts=3)
    function = routed(network, params, stats)
    indices = jnp.asarray(np.arange(8)[:, None, None] % 3, jnp.int32)
    forced = Routing(indices, jnp.ones((8, 1, 1)), jnp.zeros((8, 1, 3)))
    expected = network.apply(params, stats, images, routing=forced)[0].logits
    np.testing.assert_allclose(function.follow(images, indices), expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[0], pytest.param(SETTINGS[2], marks=pytest.mark.slow)],
    ids=["global", "per_layer"],
)
def test_every_pathway_within_reach(tiny, images, settings):
    """Of each route reached: the pathway held fixed errs on the image, or was not fooled."""
    network, params, stats = tiny(**settings)
    function = routed(network, params, stats)
    labels = jnp.argmax(function(images), axis=1)
    attack = jax.jit(worst_pathway(linf(0.2), num_steps=5, search_steps=5))
    found = attack(function, images, labels, jax.random.key(0))
    clean = np.sort(function.classify(images).indices)
    np.testing.assert_array_equal(found.routes[:, 0], clean)
    assert np.any(found.routes[:, 1:] != found.routes[:, :1])  # some were led elsewhere
    logits = function(found.adversarial)
    np.testing.assert_array_equal(found.network_fooled, np.argmax(logits, axis=1) != labels)
    assert np.abs(found.adversarial - images).max() <= 0.2 * (1 + 1e-5)


def test_a_dense_network_is_a_plain_function(tiny, images):
    network, params, stats = tiny(num_experts=1)
    function = whole(network, params, stats)
    assert not isinstance(function, Routed)
    expected = network.apply(params, stats, images)[0].logits
    np.testing.assert_allclose(function(images), expected, atol=1e-5)
    moe = tiny(num_experts=2)
    assert isinstance(whole(*moe), Routed)


@pytest.mark.parametrize("name", ["apgd-ce20", "frozen_route2"])
def test_an_attack_is_compiled_once_for_all_networks_of_one_structure(tiny, images, caplog, name):
    """Neither a later call of the device nor another seed's parameters cost a compilation."""
    mesh, protocol = data_mesh(2), Protocol(linf(0.01), 0.01)

    def programs(seed):
        network, *weights = tiny(num_experts=2, seed=seed)
        weights = replicate(tuple(weights), mesh)
        labels = np.argmax(whole(network, *weights)(images), axis=1)
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            named_attack(name, protocol, network.parts).run(
                *(network, *weights, np.asarray(images), labels, jax.random.key(0)),
                **{"batch_size": 8, "mesh": mesh, "progress": False},
            )
        said = [re.match(r"Compiling jit\((\w+)\)", r.getMessage()) for r in caplog.records]
        return [match[1] for match in said if match]

    # One attacks; one answers the clean images, unless another test has compiled it before.
    assert programs(seed=0).count("_on_device") in (1, 2)
    assert not {"_on_device", "_classify"} & set(programs(seed=1))
