"""Networks with side exits: sizes, places, heads, stages, and when images leave."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import count_params
from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.network import functional
from advmoe_jax.models.trunk import NEVER, entropy, first_exit, with_thresholds

PUBLISHED = {
    "small_cnn": ((1, 3), (28, 28, 1), 836_846),
    "resnet38_cifar": ((2, 5, 8, 11, 14, 17), (32, 32, 3), 692_310),
    "mobilenet_v2": ((1, 4, 7, 9, 12, 15), (32, 32, 3), 2_343_798),
}


def made(name, exits, channels=3, classes=5, **settings):
    settings = {"mean": (0.0,), "std": (1.0,), "exits": exits} | settings
    cnn = CNN(name, **settings)
    create = lambda: cnn.create(in_channels=channels, num_classes=classes, rngs=nnx.Rngs(0))  # noqa: E731
    return create


def shapes(*arguments, **settings):
    return functional(nnx.eval_shape(made(*arguments, **settings)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_size(name):
    exits, shape, total = PUBLISHED[name]
    network, params, stats = shapes(name, exits, shape[-1], 10)
    assert count_params(params) == total
    assert network.parts == ("backbone", "exits") and network.num_exits == len(exits) + 1
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    output = jax.eval_shape(lambda p, s, x: network.apply(p, s, x)[0], params, stats, images)
    assert [logits.shape for logits in output.exits] == [(2, 10)] * (len(exits) + 1)
    assert output.logits.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("resnet18_cifar", (1, 3, 5, 7)),
        ("wrn_28_4_cifar", (4, 8)),
        ("vgg11_bn", (2, 5)),
        ("vgg16", (4,)),
        ("densenet_cifar", (3, 9, 15)),
        ("resnet50_imagenet", (3, 7)),
    ],
)
def test_any_backbone_can_have_exits(name, exits):
    network, params, stats = shapes(name, exits)
    dense, without, _ = shapes(name, ())
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    output = jax.eval_shape(lambda p, s, x: network.apply(p, s, x)[0], params, stats, images)
    assert len(output.exits) == len(exits) + 1
    # The backbone is what it is without exits.
    assert jax.tree.structure(params["backbone"]) == jax.tree.structure(without["backbone"])
    assert dense.num_exits == 1 and dense.parts == ("backbone",)


@pytest.fixture(scope="module")
def narrow():
    """A ResNet-10 of width 4 with every place taken, random statistics, and images."""
    network, params, stats = functional(made("resnet10_cifar", (1, 2, 3), width=4)())
    keys = iter(jax.random.split(jax.random.key(1), 200))
    noisy = jax.tree.map(lambda x: x + 0.3 * jax.random.uniform(next(keys), x.shape), stats)
    stats = with_thresholds(noisy, jnp.full(3, NEVER))
    images = jax.random.uniform(jax.random.key(0), (6, 16, 16, 3))
    return network, params, stats, images


def test_the_stages_one_after_the_other_are_the_network(narrow):
    network, params, stats, images = narrow
    output = jax.jit(lambda x: network.apply(params, stats, x)[0])(images)
    x = images
    for number in range(network.num_exits):
        passed_by = network.stage(params, stats, number, x, answers=number == 3)[0]
        x, logits = network.stage(params, stats, number, x)
        np.testing.assert_allclose(passed_by, x, atol=1e-6)
        np.testing.assert_allclose(logits, output.exits[number], atol=1e-5)
    np.testing.assert_array_equal(output.logits, output.exits[-1])
    assert np.abs(output.exits[0] - output.exits[2]).max() > 1e-4
    np.testing.assert_array_equal(output.answers, np.stack(output.exits, axis=1))


def test_who_looks_at_one_exit_does_not_pay_for_the_others(narrow):
    network, params, stats, images = narrow

    def flops(numbers):
        def total(x):
            exits = network.apply(params, stats, x)[0].exits
            return sum(jnp.sum(exits[number]) for number in numbers)

        return jax.jit(jax.grad(total)).lower(images).compile().cost_analysis()["flops"]

    together = flops(range(4))
    assert flops([0]) < 0.75 * together and flops([3]) < 0.75 * together


def test_entropy_is_the_published_one_and_the_first_sure_exit_is_taken():
    logits = np.array([[[0.0, 0, 0], [9, 0, 0]], [[50, 0, 0], [0, 0, 0]]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -(p * np.log(p + 1e-5)).sum(-1)
    found = entropy(jnp.asarray(logits))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[1, 0] == pytest.approx(-1e-5, rel=0.1) and found[0, 0] == pytest.approx(
        1.0986, 1e-3
    )
    entropies = jnp.asarray([[0.5, 0.1], [0.5, 0.2], [0.4, 0.1], [0.6, 0.6]])
    # Strictly below: an entropy at its threshold stays.
    np.testing.assert_array_equal(first_exit(entropies, jnp.asarray([0.5, 0.2])), [1, 2, 0, 2])
    np.testing.assert_array_equal(first_exit(found, jnp.full(2, NEVER)), [2, 2])


@pytest.mark.parametrize(
    ("name", "exits", "more", "words"),
    [
        ("resnet38_cifar", (2, 18), {}, "18 blocks; .* of the blocks 1 to 17"),
        ("resnet38_cifar", (0, 2), {}, "1 to 17"),
        ("resnet38_cifar", (5, 2), {}, "must ascend"),
        ("resnet38_cifar", (2, 2), {}, "must ascend"),
        ("resnet38_cifar", (2.5,), {}, "numbers of blocks"),
        ("small_cnn", (2,), {}, r"no exit behind block 2; choose from \(1, 3\)"),
        ("small_cnn", (1, 3), {"num_experts": 2}, "dense network"),
        ("small_cnn", (1, 3), {"ratio": 0.5}, "one width"),
        ("mobilenet_v2", (), {"keep": 0.5}, "dense network"),
        ("vgg11", (8,), {}, "8 blocks"),
    ],
)  # fmt: skip
def test_exits_at_places_that_do_not_exist(name, exits, more, words):
    with pytest.raises(UserError, match=words) as told:
        CNN(name, exits=exits, **more).check(3)
    assert "\n" not in str(told.value)


def test_small_cnn_is_for_images_of_its_size():
    network, params, stats = shapes("small_cnn", (1, 3), 1)
    images = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    with pytest.raises(UserError, match="28x28, not of 32x32"):
        jax.eval_shape(network.apply, params, stats, images)


def test_a_mixture_has_exits_and_an_image_its_own_pathway():
    settings = {"num_experts": 2, "ratio": 0.5, "width": 8, "block_size": 2}
    network, params, stats = functional(made("resnet10_cifar", (1, 3), **settings)())
    assert network.parts == ("experts", "exits", "router")
    images = jax.random.uniform(jax.random.key(0), (5, 16, 16, 3))
    routing = network.route(params, stats, images)[0]
    indices = jnp.asarray([0, 1, 1, 0, 1]).reshape(5, 1, 1)
    routing = routing._replace(indices=indices)
    apply = jax.jit(network.apply)
    mixed = apply(params, stats, images, routing=routing)[0].exits
    forced = [
        apply(params, stats, images, routing=routing._replace(indices=jnp.full_like(indices, e)))[0]
        for e in range(2)
    ]
    for number, logits in enumerate(mixed):
        alone = np.stack([output.exits[number] for output in forced])
        np.testing.assert_allclose(logits, alone[indices[:, 0, 0], np.arange(5)], atol=1e-5)


def test_initial_values_are_the_published_ones():
    _, params, _ = functional(made("small_cnn", (1, 3), 1, 10)())
    main, heads = params["backbone"], params["exits"]["exits"]
    assert not np.any(main["head"]["kernel"]) and not np.any(main["head"]["bias"])
    assert np.std(main["conv2"]["kernel"]) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    assert not np.any(main["conv2"]["bias"])
    for linear, fan_in in ((main["hidden1"], 1024), (heads["exit2"]["hidden1"], 1600)):
        for values in linear.values():
            assert np.abs(values).max() <= fan_in**-0.5
            assert np.std(values) == pytest.approx((3 * fan_in) ** -0.5, rel=0.15)
    _, params, _ = functional(made("resnet38_cifar", ())())
    kernel = params["backbone"]["layer1_0"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
