"""Routes of tokens under attack, and how much they matter: on a network that can be followed."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import linf, worst_pathway
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation import exchange, token_routes, views
from advmoe_jax.evaluation.explanation import Seen
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.models import ViT, functional
from advmoe_jax.routing import measures
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import Routing

EXPERTS, LAYERS, TOKENS, BATCH = 3, 2, 5, 12
SIZE = {"layers": 2, "width": 8, "hidden": 12, "heads": 2, "patch": 4}
# So small a network compiles faster with all experts computed.
SETTINGS = ViT("vit_tiny_8", num_experts=EXPERTS, placement="0,1", dispatch="every", **SIZE)


def build(**changes):
    model = SETTINGS._replace(**changes).create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))
    network, params, stats = functional(model)
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    moved = jax.tree.map(
        lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape, p.dtype), params
    )
    return network, moved, stats


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(BATCH, 8, 8, 1)).astype(np.uint8)
    return Split(images, rng.integers(4, size=BATCH).astype(np.int32))


def test_overlap_is_intersection_over_union_and_drops_do_not_count():
    clean = np.array([[[0, 1], [2, 3], [0, 1], [4, -1], [-1, -1]]])
    attacked = np.array([[[1, 0], [2, 5], [2, 3], [4, 5], [-1, -1]]])
    expected = [[1, 1 / 3, 0, 1 / 2, 0]]
    np.testing.assert_allclose(measures.overlap(clean, attacked), expected)
    np.testing.assert_allclose(measures.overlap(jnp.array(clean), jnp.array(attacked)), expected)


def test_exchanges_take_the_experts_that_they_name(network, split):
    net, params, stats = network
    images, keys = to_float(split.images), jax.random.split(jax.random.key(0), BATCH)
    free = net.apply(params, stats, images)[0]
    every = exchange.exchanges(net, keys)
    assert list(every) == ["next_best", "random", "without_0", "without_1", "without_2",
                           "top_1", "top_2", "top_3"]  # fmt: skip
    found = {
        name: net.apply(params, stats, images, exchange=make)[0] for name, make in every.items()
    }
    predicted = exchange.predictions(net, params, stats, images, keys)
    assert predicted.keys() == found.keys()
    for name, answer in predicted.items():
        np.testing.assert_array_equal(answer, np.argmax(found[name].logits, axis=1), err_msg=name)
    np.testing.assert_allclose(found["top_1"].logits, free.logits, rtol=1e-5, atol=1e-5)
    assert found["top_3"].routing.indices.shape == (BATCH, LAYERS * TOKENS, 3)
    np.testing.assert_allclose(found["top_3"].routing.weights.sum(axis=-1), 1, rtol=1e-5)
    for expert in range(EXPERTS):
        routing = found[f"without_{expert}"].routing
        assert not jnp.any(routing.indices == expert)
        own = jnp.take_along_axis(jax.nn.softmax(routing.scores), routing.indices, axis=-1)
        np.testing.assert_allclose(routing.weights, own, rtol=1e-5)
    # What stands in has the weight of whom it stands in for; layers behind see what comes of it.
    moved = found["next_best"].routing
    ranked = jnp.argsort(-moved.scores, axis=-1)
    np.testing.assert_array_equal(moved.indices, ranked[..., 1:2])
    best = jnp.max(jax.nn.softmax(moved.scores), axis=-1, keepdims=True)
    np.testing.assert_allclose(moved.weights, best, rtol=1e-5)
    assert jnp.abs(moved.scores - free.routing.scores)[:, TOKENS:].max() > 1e-3
    drawn = np.asarray(found["random"].routing.indices)
    assert all(0.1 < np.mean(drawn == expert) < 0.6 for expert in range(EXPERTS))
    assert np.any(drawn[:, :TOKENS] != drawn[:, TOKENS:])


def test_changes_are_told_by_layer_token_and_image(network):
    net = network[0]
    routes = np.zeros((2, LAYERS * TOKENS, 1), np.int32)
    attacked = routes.copy()
    attacked[0, TOKENS + 3] = 2  # the second layer's token 3 of the first image
    seen = Seen(np.array([0, 1]), None, np.array([0, 1]), np.array([0, 2]), routes, attacked)
    found = token_routes.changes(seen, net)
    assert found["layers"] == pytest.approx([0, 0.1]) and found["predictions"] == 0.5
    expected = np.zeros((LAYERS, TOKENS))
    expected[1, 3] = 0.5
    np.testing.assert_allclose(found["tokens"], expected)
    assert found["images"][0] == 0 and found["images"][-1] == pytest.approx(0.1)
    np.testing.assert_allclose(found["load_clean"], [[1, 0, 0]] * 2)
    np.testing.assert_allclose(found["load_attacked"], [[1, 0, 0], [0.9, 0, 0.1]], rtol=1e-6)


def test_routes_are_exchanged_frozen_and_transferred(network, split):
    net, params, stats = network
    protocol, key = Protocol(linf(0.1), 0.02), jax.random.key(1)
    adversarial = np.asarray(to_float(split.images))[:, ::-1]  # any other images
    ask = token_routes.importance_of_routes
    found = ask(net, params, stats, split, adversarial, protocol, key, 5)
    again = ask(net, params, stats, split, adversarial, protocol, key, BATCH)
    assert found == again  # the size of batches is no matter
    assert found["exchange"]["top_1"]["clean"]["changed"] == 0
    assert found["exchange"]["next_best"]["attacked"]["changed"] > 0
    frozen, images = found["frozen"], to_float(split.images)
    clean = net.apply(params, stats, images)[0]
    assert frozen["on_clean_routes"] <= np.mean(np.argmax(clean.logits, -1) == split.labels)
    held = net.apply(params, stats, adversarial, routing=Routing(clean.routing.indices))[0]
    right = np.mean(np.argmax(held.logits, -1) == split.labels)
    assert frozen["free_on_clean_routes"] == pytest.approx(right)


def test_neighbours_matter_where_places_are_few(network, split):
    net, params, stats = network
    alone = token_routes.neighbours(net, params, stats, split, 4)
    assert alone["predictions"] == alone["routes"] == alone["dropped"] == 0
    few = build(capacity=Capacity(evaluation=0.6, images=4))[0]
    found = token_routes.neighbours(few, params, stats, split, 4)
    assert found["routes"] > 0 and 0 < found["dropped"] < 1


def test_the_studys_attack_has_its_settings():
    attack = named_attack("vmoe_pgd", Protocol(linf(0.1), 0.5), ("backbone",))
    assert attack.settings == {
        "norm": "linf", "epsilon": 0.1, "num_steps": 40, "step_size": 0.1 / 40, "start": "none",
        "restarts": 1,
    }  # fmt: skip
    assert named_attack("vmoe_pgd8", Protocol(linf(0.1), 0.5), ("backbone",)).num_steps == 8


def test_the_auxiliary_loss_is_of_an_images_own_tokens(network, split):
    net, params, stats = network
    images = to_float(split.images)
    logits, importance = views.with_importance(net, params, stats)(images)
    routing = net.apply(params, stats, images)[0].routing
    shares = np.asarray(jax.nn.softmax(routing.scores)).reshape(BATCH, LAYERS, TOKENS, EXPERTS)
    mean = shares.mean(axis=2)
    np.testing.assert_allclose(
        importance, np.sum(mean.var(axis=-1) / mean.mean(axis=-1) ** 2, axis=-1), rtol=1e-4
    )
    attack = named_attack("vmoe_pgd_aux3", Protocol(linf(0.1), 0.5), net.parts)
    keys = jax.random.split(jax.random.key(0), BATCH)
    found = attack.perturb(net, params, stats, images, split.labels, keys)
    assert 0.05 < float(jnp.abs(found - images).max()) <= 0.1 + 1e-6
    assert logits.shape == (BATCH, 4)


@pytest.mark.parametrize("samples", [0, 2])
def test_pathways_are_sampled_besides_those_of_one_expert(network, split, samples):
    net, params, stats = network
    attack = jax.jit(worst_pathway(linf(0.2), num_steps=2, search_steps=3, samples=samples))
    function = views.routed(net, params, stats)
    images = to_float(split.images[:4])
    found = attack(function, images, split.labels[:4], jax.random.key(0))
    assert found.routes.shape == (4, 1 + EXPERTS + samples, LAYERS * TOKENS, 1)
    assert found.fooled.shape == (4, 1 + EXPERTS + samples)
    # The first is the clean image's own.
    own = net.route(params, stats, images)[0].indices
    np.testing.assert_array_equal(found.routes[:, 0], own)


def test_places_are_counted_of_the_experts_that_are_followed():
    """An exchange that weighs all choices anew does not lift the capacity."""
    net, params, stats = build(top_k=2, capacity=Capacity(evaluation=0.6, images=3))
    images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))

    def weights(exchange):
        routing = net.apply(params, stats, images, exchange=exchange)[0].routing
        return routing.weights[:, :TOKENS]  # of the first layer, before which nothing differs

    dropped = weights(None) == 0
    assert 0.1 < dropped.mean() < 0.9
    anew = weights(lambda routing: routing._replace(weights=jnp.ones_like(routing.weights)))
    np.testing.assert_array_equal(anew == 0, dropped)
