"""ViT and V-MoE: sizes, routes of tokens, what an image's output depends on, bad settings."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import count_params, network_cost
from advmoe_jax.models import SIZES, ViT, functional
from advmoe_jax.models.transformer import dropout
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import Routing

SMALL = ViT("vit_tiny_8", layers=2, width=8, hidden=12, heads=2, patch=4)
# So small a network compiles faster with all experts computed.
MOE = SMALL._replace(num_experts=3, top_k=2, placement="0,1", dispatch="every")
TOKENS = 5


def build(settings, seed=0):
    """A network that says something: its head and routers are not about zero."""
    model = settings.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(seed))
    network, params, stats = functional(model)
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    moved = jax.tree.map(
        lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape, p.dtype), params
    )
    return network, moved, stats


def images_of(batch, seed=1):
    return jax.random.uniform(jax.random.key(seed), (batch, 8, 8, 1))


def answer(network, *arguments, train=False, **more):
    """What the network says, compiled."""
    return jax.jit(partial(network.apply, train=train))(*arguments, **more)[0]


@pytest.fixture(scope="module")
def moe():
    return build(MOE)


def parameters(settings, image=224, classes=18291):
    model = nnx.eval_shape(
        lambda: settings.create(in_channels=3, num_classes=classes, rngs=nnx.Rngs(0))
    )
    assert model.backbone.image_size == image
    return count_params(functional(model)[1])


@pytest.mark.parametrize(
    ("name", "dense", "every_2", "last_2"),
    [
        ("vit_s32", 36.5, 296.9, 166.7),
        ("vit_b32", 102.1, 980.6, 395.0),
        ("vit_b16", 100.5, 979.0, 393.3),
        ("vit_l16", 323.1, 3446.0, 843.6),
    ],
)
def test_parameters_are_as_many_as_published(name, dense, every_2, last_2):
    """With the JFT head of 18,291 classes behind a tanh layer: Riquelme et al., 2021, table 8."""
    settings = ViT(name, representation=SIZES[name].width)
    assert round(parameters(settings) / 1e6, 1) == dense
    moe = settings._replace(num_experts=32, top_k=2)
    assert round(parameters(moe) / 1e6, 1) == every_2
    assert round(parameters(moe._replace(placement="last_2")) / 1e6, 1) == last_2


def test_macs_are_those_of_the_matrices():
    size, tokens = SMALL.size, TOKENS
    block = 4 * tokens * size.width**2 + 2 * tokens**2 * size.width
    mlp = 2 * tokens * size.width * size.hidden
    rest = 4 * 16 * size.width + size.width * 4
    assert network_cost(SMALL, (8, 8, 1), 4)["macs"]["total"] == 2 * (block + mlp) + rest
    cost = network_cost(MOE, (8, 8, 1), 4)["macs"]
    assert cost["pathway"] == 2 * (block + 2 * mlp) + rest
    assert cost["router"] == 2 * tokens * size.width * 3
    # More experts cost no more, but for their scores.
    many = network_cost(MOE._replace(num_experts=7), (8, 8, 1), 4)["macs"]
    assert many["pathway"] == cost["pathway"]


def test_one_decision_per_layer_and_token(moe):
    network, params, stats = moe
    output = jax.jit(network.apply)(params, stats, images_of(6))[0]
    assert network.num_routers == 2 and network.score_shape == (2 * TOKENS, 3)
    assert network.decisions[:2] == ("block0_mlp_token0", "block0_mlp_token1")
    assert output.routing.indices.shape == (6, 2 * TOKENS, 2)
    weights = jnp.take_along_axis(
        jax.nn.softmax(output.routing.scores), output.routing.indices, axis=-1
    )
    np.testing.assert_allclose(output.routing.weights, weights, rtol=1e-6)
    assert len(np.unique(output.routing.indices[..., 0])) > 1


@pytest.mark.parametrize("strategy", ["blocks", "every"])
def test_an_image_does_not_depend_on_its_batch(strategy):
    network, params, stats = build(MOE._replace(dispatch=strategy))
    images = images_of(7)
    apply = jax.jit(network.apply)
    together = apply(params, stats, images)[0]
    alone = [apply(params, stats, images[i : i + 1])[0] for i in (0, 6)]
    for i, one in zip((0, 6), alone, strict=True):
        np.testing.assert_allclose(one.logits[0], together.logits[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one.routing.indices[0], together.routing.indices[i])


def test_few_places_couple_images_and_enough_couple_none(moe):
    _, params, stats = moe
    images = images_of(4)
    free = answer(build(MOE)[0], params, stats, images)
    enough = Capacity(evaluation=3 / 2, images=4)  # experts over choices
    same = answer(build(MOE._replace(capacity=enough))[0], params, stats, images)
    np.testing.assert_array_equal(same.logits, free.logits)
    np.testing.assert_array_equal(same.routing.weights, free.routing.weights)
    few = build(MOE._replace(capacity=Capacity(evaluation=0.3, images=4)))[0]
    output = answer(few, params, stats, images)
    assert 0 < int(jnp.sum(output.routing.weights == 0)) < output.routing.weights.size
    other = answer(few, params, stats, images.at[0].set(1 - images[0]))
    assert jnp.abs(other.logits[1:] - output.logits[1:]).max() > 1e-3
    # In training these have places for all.
    trained = answer(few, params, stats, images, train=True)
    np.testing.assert_array_equal(trained.logits, free.logits)


def test_experts_may_change_places_with_their_routers_columns(moe):
    network, params, stats = moe
    order = jnp.array([2, 0, 1])
    experts = jax.tree.map(
        lambda p, stacked: p[order] if stacked else p, params["experts"], network.stacked["experts"]
    )
    router = jax.tree.map(lambda p: p[:, order], params["router"])
    images = images_of(5)
    before = answer(network, params, stats, images)
    after = answer(network, {"experts": experts, "router": router}, stats, images)
    np.testing.assert_allclose(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(order[after.routing.indices], before.routing.indices)
    assert jnp.any(after.routing.indices != before.routing.indices)


def test_a_route_given_by_its_experts_is_weighed_where_the_image_passes(moe):
    network, params, stats = moe
    images, apply = images_of(5), jax.jit(network.apply)
    free = apply(params, stats, images)[0]
    again = apply(params, stats, images, routing=Routing(free.routing.indices))[0]
    np.testing.assert_allclose(again.logits, free.logits, rtol=1e-5, atol=1e-5)
    shifted = Routing((free.routing.indices + 1) % 3)
    moved = apply(params, stats, images, routing=shifted)[0]
    np.testing.assert_array_equal(moved.routing.indices, shifted.indices)
    expected = jnp.take_along_axis(jax.nn.softmax(moved.routing.scores), shifted.indices, axis=-1)
    np.testing.assert_allclose(moved.routing.weights, expected, rtol=1e-6)
    # The second layer has other inputs than along the free route.
    assert jnp.abs(moved.routing.scores - free.routing.scores)[:, TOKENS:].max() > 1e-3
    # All experts of every token, fewer and more than it has usually.
    for k in (1, 3):
        everyone = jnp.broadcast_to(jnp.arange(k), (5, 2 * TOKENS, k))
        output = apply(params, stats, images, routing=Routing(everyone))[0]
        assert output.routing.weights.shape == (5, 2 * TOKENS, k)
        assert np.isfinite(output.logits).all()


def test_identical_experts_answer_alike():
    for identical in (False, True):
        _, params, _ = functional(
            MOE._replace(identical_experts=identical).create(
                in_channels=1, num_classes=4, rngs=nnx.Rngs(0)
            )
        )
        kernel = params["experts"]["block0"]["mlp"]["dense1"]["kernel"]
        assert bool(jnp.all(kernel[0] == kernel[1])) == identical


def test_dropout_is_there_in_training_alone_and_by_the_images_own_key():
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "expert_dropout": 0.5}
    network, params, stats = build(MOE._replace(**rates))
    assert network.is_stochastic and not build(MOE)[0].is_stochastic
    plain = answer(build(MOE)[0], params, stats, images_of(4)).logits
    keys, images = jax.random.split(jax.random.key(3), 4), images_of(4)
    apply = jax.jit(partial(network.apply, train=True))
    np.testing.assert_allclose(
        answer(network, params, stats, images, keys=keys).logits, plain, rtol=1e-5, atol=1e-5
    )
    dropped = apply(params, stats, images, keys=keys)[0].logits
    assert jnp.abs(dropped - plain).max() > 1e-2
    some = apply(params, stats, images[2:], keys=keys[2:])[0].logits
    np.testing.assert_allclose(some, dropped[2:], rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 50)
    x = jnp.ones((50, 400))
    dropped = dropout(x, 0.25, keys, 3)
    assert set(np.unique(dropped).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(jnp.mean(dropped)) - 1) < 0.02
    assert jnp.any(dropped[0] != dropped[1])
    assert dropout(x, 0.25, None, 3) is x


def test_bfloat16_computes_in_it_and_routes_in_float32():
    network, params, stats = build(MOE._replace(dtype="bfloat16"))
    exact = answer(build(MOE)[0], params, stats, images_of(8))
    output = answer(network, params, stats, images_of(8))
    assert output.logits.dtype == output.routing.scores.dtype == jnp.float32
    assert output.routing.weights.dtype == jnp.float32
    error = jnp.abs(output.logits - exact.logits).max() / jnp.abs(exact.logits).max()
    assert 1e-5 < error < 0.2


def test_the_head_may_see_the_mean_of_all_tokens():
    network, params, stats = build(SMALL._replace(pool="mean"))
    assert "cls" not in params["backbone"] and params["backbone"]["positions"].shape == (4, 8)
    assert answer(network, params, stats, images_of(2)).logits.shape == (2, 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "vit_tiny_9"}, "did you mean 'vit_tiny_8'"),
        ({"patch": 3}, r"model\.patch=3 does not divide the images' side, 8.*such as 2"),
        ({"heads": 3}, r"model\.heads=3 does not divide model\.width=8"),
        (
            {"placement": "1,2"},
            r"model\.placement='1,2' names blocks that do not exist: there are 2",
        ),
        ({"placement": "last_2"}, "do not exist.*every_2 has 1"),
        ({"placement": "odd"}, r"model\.placement='odd' is unknown"),
        ({"top_k": 4}, r"model\.top_k=4 must lie between 1 and num_experts=3"),
        ({"top_k": 0}, r"model\.top_k=0 must be at least 1"),
        ({"num_experts": 1}, r"model\.top_k=2 must be 1: model\.num_experts=1 is dense"),
        ({"pool": "max"}, r"model\.pool='max' is unknown; choose one of token, mean"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0 must lie in \[0, 1\)"),
        (
            {"capacity": Capacity(training=-1.0)},
            r"model\.capacity\.training=-1\.0 must be positive",
        ),
        ({"capacity": Capacity(images=0)}, r"model\.capacity\.images=0 must be at least 1"),
        ({"mean": (0.5, 0.5)}, r"model\.mean has 2 values"),
        ({"dtype": "float16"}, r"model\.dtype='float16'"),
        ({"layers": -1}, r"model\.layers=-1 must be positive, or 0"),
        ({"gate": "hard"}, r"model\.gate='hard' is unknown"),
    ],
)
def test_what_cannot_be_built_is_named(changes, text):
    with pytest.raises(UserError, match=text):
        MOE._replace(**changes).create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))


def test_images_of_another_size_are_refused():
    network, params, stats = build(SMALL)
    with pytest.raises(UserError, match=r"model\.image_size=8, but the images are 12x12"):
        network.apply(params, stats, jnp.zeros((1, 12, 12, 1)))
