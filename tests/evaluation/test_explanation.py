"""Explanations: shares counted by hand and routes followed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import linf
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation import explanation
from advmoe_jax.evaluation.explanation import choose_examples, describe, robust_accuracies
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.models.registry import model as by_name
from advmoe_jax.models.trunk import with_thresholds

PROTOCOL = Protocol(linf(0.2), 0.02)


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(12, 8, 8, 1), dtype=np.uint8)
    return Split(images, rng.integers(4, size=12).astype(np.int32))


def see(network, split, name):
    network, params, stats = network
    attack = named_attack(name, PROTOCOL, network.parts)
    return explanation.see(network, params, stats, split, attack, jax.random.key(3), 6)


def predictions(network, images):
    """Class and route of each image, and the class along each expert's pathway."""
    network, params, stats = network

    @jax.jit
    def answer(images):
        own = network.apply(params, stats, images)[0]
        forced = [
            own.routing._replace(indices=jnp.full_like(own.routing.indices, expert))
            for expert in range(network.num_experts)
        ]
        along = [network.apply(params, stats, images, routing=r)[0].logits for r in forced]
        return own.logits.argmax(1), own.routing.indices, [x.argmax(1) for x in along]

    return answer(images)


@pytest.mark.parametrize("scope", ["global", pytest.param("per_layer", marks=pytest.mark.slow)])
def test_every_answer_is_the_networks(tiny, split, scope):
    network = tiny(2, scope=scope)
    seen = see(network, split, "pgd2")
    clean = jnp.asarray(split.images, jnp.float32) / 255
    assert 0.1 < np.abs(seen.adversarial - clean).max() <= 0.2 + 1e-6
    for images, answers, routes, forced in (
        (clean, seen.clean, seen.routes, seen.forced),
        (jnp.asarray(seen.adversarial), seen.attacked, seen.attacked_routes, seen.forced_attacked),
    ):
        expected, indices, along = predictions(network, images)
        np.testing.assert_array_equal(answers, expected)
        np.testing.assert_array_equal(routes, indices)
        np.testing.assert_array_equal(forced, along)
    # A pathway is what images that chose it anyway take.
    for expert in (0, 1):
        of_expert = (seen.routes[..., 0] == expert).all(axis=1)
        np.testing.assert_array_equal(seen.forced[expert][of_expert], seen.clean[of_expert])
    kept = (seen.routes == seen.attacked_routes).all(axis=(1, 2))
    np.testing.assert_array_equal(seen.clean_rerouted[kept], seen.clean[kept])
    np.testing.assert_array_equal(seen.attacked_on_route[kept], seen.attacked[kept])


def test_a_dense_network_has_no_routes(tiny, split):
    seen = see(tiny(1), split, "pgd2")
    assert seen.routes is None and seen.forced is None
    assert describe(seen, 1, 4) is None
    assert len(choose_examples(seen, 5)) == 5


def test_shares_by_hand(made_up):
    found = describe(made_up, 2, 3)
    assert found["load"] == [0.5, 0.5]
    assert found["load_per_class"] == [[0.75, 0.25], None, [0.25, 0.75]]
    assert found["agreement"] == [0.75, 0.75]
    assert found["layers"]["load"] == [[0.5, 0.5], [0.5, 0.5]]
    assert found["layers"]["confusion"] == [[[0.5, 0.0], [0.25, 0.25]], [[0.25, 0.25], [0.0, 0.5]]]
    assert found["confusion"] == [[0.375, 0.125], [0.125, 0.375]]
    assert found["pathways"] == {"clean": [0.5, 0.5], "attacked": [0.25, 0.25]}
    assert found["accuracy"] == {
        "clean": {"clean_route": 0.75, "attacked_route": 0.5},
        "attacked": {"clean_route": 0.75, "attacked_route": 0.5},
    }


def test_examples_show_every_kind_and_wrong_ones_last(made_up):
    # Image 0: route and prediction change; 1: neither; 2: the route alone; 3: wrong all along.
    assert choose_examples(made_up, 8) == [0, 2, 1, 3]
    assert choose_examples(made_up, 2) == [0, 2]


def test_the_curve_ends_where_an_evaluation_would(tiny, split):
    network = tiny(2)
    curve = robust_accuracies(*network, split, PROTOCOL, jax.random.key(3), 5)
    assert curve["epsilon"] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
    by_radius = dict(zip(np.round(curve["epsilon"], 3), curve["accuracy"], strict=True))
    seen = see(network, split, f"pgd{explanation.CURVE_STEPS}")
    assert by_radius[0.0] == np.mean(seen.clean == split.labels)
    assert by_radius[0.2] == np.mean(seen.attacked == split.labels)


def test_of_several_exits_the_one_that_an_image_leaves_at_answers(split):
    values = {"exits": (1, 2), "width": 2, "image_shape": (8, 8, 1), "num_classes": 4}
    network, params, stats = by_name("resnet10_cifar", **values)
    stats = with_thresholds(stats, np.array([np.log(4) + 1, 0.0]))  # all leave at the first
    images = jnp.asarray(split.images, jnp.float32) / 255
    exits = network.apply(params, stats, images)[0].exits
    first, last = (np.argmax(exits[i], axis=-1) for i in (0, -1))
    assert np.any(first != last)
    seen = see((network, params, stats), split, "pgd2")
    np.testing.assert_array_equal(seen.clean, first)
    curve = robust_accuracies(
        network, params, stats, split._replace(labels=first), PROTOCOL, jax.random.key(0), 6
    )
    assert curve["epsilon"][0] == 0 and curve["accuracy"][0] == 1


def test_choices_that_were_dropped_are_told_as_such(split):
    size = {"patch": 4, "layers": 2, "width": 16, "hidden": 16, "heads": 2, "placement": "1"}
    values = {"num_experts": 3, "top_k": 2, "image_shape": (8, 8, 1), "num_classes": 4, **size}
    network, params, stats = by_name(
        "vit_tiny_8", capacity={"evaluation": 0.6, "images": 3}, **values
    )
    seen = see((network, params, stats), split, "pgd2")
    assert 0.1 < np.mean(seen.routes == -1) < 0.9
    assert np.all(seen.routes >= -1) and np.any(seen.attacked_routes == -1)
    full = by_name("vit_tiny_8", **values)
    assert np.all(see(full, split, "pgd2").routes >= 0)
