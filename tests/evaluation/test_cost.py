"""Counts are compared with arithmetic done by hand, and with the compiler's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import (
    AFFORDABLE,
    count_macs,
    count_params,
    default_router,
    describe,
    network_cost,
)
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.router import PRESETS

TABLE = [  # name, experts, ratio, image size, parameters without the router, MACs of one pathway
    ("resnet18_cifar", 1, 1.0, 32, 11_173_962, 555_422_720),
    ("resnet18_cifar", 1, 0.5, 32, 2_797_610, 139_299_328),
    ("resnet18_cifar", 2, 0.5, 32, 5_565_450, 151_718_400),
    ("resnet34_cifar", 1, 1.0, 32, 21_282_122, 1_159_402_496),
    ("resnet34_cifar", 1, 0.5, 32, 5_326_506, 290_294_272),
    ("resnet34_cifar", 2, 0.5, 32, 10_619_530, 302_713_344),
    ("resnet50_cifar", 1, 1.0, 32, 23_520_842, 1_297_829_888),
    ("resnet50_cifar", 1, 0.5, 32, 5_899_050, 324_904_960),
    ("resnet50_cifar", 2, 0.5, 32, 11_075_274, 331_032_576),
    ("wrn_28_4_cifar", 1, 1.0, 32, 5_849_050, 845_597_184),
    ("wrn_28_4_cifar", 1, 0.5, 32, 1_464_818, 211_510_528),
    ("wrn_28_4_cifar", 2, 0.5, 32, 2_924_530, 211_510_528),
    ("wrn_28_10_cifar", 1, 1.0, 32, 36_479_194, 5_243_328_768),
    ("wrn_28_10_cifar", 1, 0.5, 32, 9_126_002, 1_310_944_384),
    ("wrn_28_10_cifar", 2, 0.5, 32, 18_239_602, 1_310_944_384),
    ("wrn_34_10_cifar", 1, 1.0, 32, 46_160_474, 6_658_906_368),
    ("wrn_34_10_cifar", 1, 0.5, 32, 11_547_442, 1_664_838_784),
    ("wrn_34_10_cifar", 2, 0.5, 32, 23_080_242, 1_664_838_784),
    ("vgg16_bn", 1, 1.0, 32, 15_311_818, 313_788_928),
    ("vgg16_bn", 1, 0.5, 32, 4_013_034, 79_071_744),
    ("vgg16_bn", 2, 0.5, 32, 7_690_218, 79_071_744),
    ("densenet_cifar", 1, 1.0, 32, 176_122, 72_365_352),
    ("densenet_cifar", 1, 0.5, 32, 45_802, 18_257_556),
    ("resnet18_imagenet", 1, 1.0, 224, 11_689_512, 1_814_073_344),
    ("resnet18_imagenet", 2, 0.5, 224, 5_845_256, 483_149_824),
    ("resnet50_imagenet", 1, 1.0, 224, 25_557_032, 4_089_184_256),
    ("resnet50_imagenet", 2, 0.5, 224, 12_779_016, 1_052_311_552),
]


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(images, kernel, strides=(1, 1), padding="VALID", **kwargs):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


@pytest.mark.parametrize(
    ("image", "kernel", "kwargs", "expected"),
    [
        # batch x height x width x output channels x taps x input channels per group
        ((2, 8, 8, 3), (3, 3, 3, 16), {}, 2 * 6 * 6 * 16 * 9 * 3),
        ((2, 8, 8, 3), (3, 3, 3, 16), {"padding": "SAME"}, 2 * 8 * 8 * 16 * 9 * 3),
        ((2, 8, 8, 3), (3, 3, 3, 16), {"strides": (2, 2), "padding": "SAME"}, 2 * 16 * 16 * 27),
        ((1, 9, 7, 4), (1, 3, 4, 8), {"strides": (2, 1)}, 5 * 5 * 8 * 3 * 4),
        ((1, 8, 8, 6), (3, 3, 2, 12), {"feature_group_count": 3}, 6 * 6 * 12 * 9 * 2),
        ((1, 8, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}, 6 * 6 * 6 * 9),
        ((6, 8, 8, 4), (3, 3, 4, 9), {"batch_group_count": 3}, 2 * 6 * 6 * 9 * 9 * 4),
        ((1, 9, 9, 2), (3, 3, 2, 5), {"rhs_dilation": (2, 2)}, 5 * 5 * 5 * 9 * 2),
        (
            (1, 4, 4, 2),
            (3, 3, 2, 5),
            {"lhs_dilation": (2, 2), "padding": [(0, 0)] * 2},
            5 * 5 * 5 * 9 * 2,
        ),
        ((0, 8, 8, 3), (3, 3, 3, 16), {}, 0),
    ],
)
def test_convolution(image, kernel, kwargs, expected):
    assert count_macs(lambda x, w: conv(x, w, **kwargs), spec(*image), spec(*kernel)) == expected


def test_convolution_counts_alike_in_every_layout():
    def channels_first(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    first = count_macs(channels_first, spec(2, 3, 8, 8), spec(16, 3, 3, 3))
    assert first == count_macs(conv, spec(2, 8, 8, 3), spec(3, 3, 3, 16))


@pytest.mark.parametrize("batch_axes", [(0, None), (None, 0), (0, 0)])
def test_vmapped_convolution(batch_axes):
    shapes = [(2, 8, 8, 3), (3, 3, 3, 16)]
    operands = [
        spec(5, *shape) if axis == 0 else spec(*shape)
        for shape, axis in zip(shapes, batch_axes, strict=True)
    ]
    expected = 5 * (2 * 6 * 6 * 16 * 9 * 3)
    assert count_macs(jax.vmap(conv, in_axes=batch_axes), *operands) == expected


def test_dot_products():
    assert count_macs(jnp.dot, spec(7), spec(7)) == 7
    assert count_macs(jnp.matmul, spec(2, 3), spec(3, 5)) == 30
    assert count_macs(jnp.matmul, spec(4, 2, 3), spec(4, 3, 5)) == 120
    assert count_macs(
        lambda a, b: jnp.einsum("bhqd,bhkd->bhqk", a, b), *[spec(2, 3, 4, 5)] * 2
    ) == (2 * 3 * 4 * 4 * 5)
    assert count_macs(lambda a, b: jnp.einsum("i,j->ij", a, b), spec(3), spec(4)) == 12


def test_ragged_dot_counts_each_row_for_one_group():
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    rows, experts = spec(10, 3), spec(4, 3, 5)
    assert count_macs(lax.ragged_dot, rows, experts, sizes) == 10 * 3 * 5

    def loss(rows, experts, sizes):
        return lax.ragged_dot(rows, experts, sizes).sum()

    # Forward (unused by the gradient of a sum, but traced), rows' gradient, experts' gradient.
    assert count_macs(jax.grad(loss, argnums=(0, 1)), rows, experts, sizes) == 3 * 10 * 3 * 5


def square(x):
    return x @ x


@jax.custom_vjp
def square_vjp(x):
    return x @ x


square_vjp.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))


@jax.custom_jvp
def square_jvp(x):
    return x @ x


square_jvp.defjvp(lambda primals, tangents: (square_jvp(*primals), tangents[0]))


@pytest.mark.parametrize(
    "wrapped",
    [square_vjp, square_jvp, jax.checkpoint(square), jax.jit(square), jax.jit(jax.jit(square))],
)
def test_one_level_down(wrapped):
    assert count_macs(wrapped, spec(3, 3)) == 27
    assert count_macs(lambda x: jax.jit(wrapped)(x) + wrapped(x), spec(3, 3)) == 54
    assert count_macs(jax.vmap(wrapped), spec(5, 3, 3)) == 5 * 27


def test_gradients_count_the_backward_rule():
    # custom_vjp: forward rule 27, backward rule 2 x 27.
    assert count_macs(jax.grad(lambda x: square_vjp(x).sum()), spec(3, 3)) == 81


def test_scan_counts_its_body_length_times():
    def five_convolutions(x, w):
        return lax.scan(lambda c, _: (conv(c, w, padding="SAME"), None), x, length=5)[0]

    once, three = 8 * 8 * 4 * 9 * 4, spec(3, 3, 3)
    assert count_macs(five_convolutions, spec(1, 8, 8, 4), spec(3, 3, 4, 4)) == 5 * once
    assert count_macs(lambda x: lax.map(square, x), spec(6, 3, 3)) == 6 * 27
    assert count_macs(lambda x: lax.fori_loop(2, 6, lambda _, c: lax.map(square, c), x), three) == (
        4 * 3 * 27
    )
    assert count_macs(lambda x: lax.fori_loop(0, 0, lambda _, c: c @ c, x), spec(3, 3)) == 0


def test_cond_counts_the_most_expensive_branch():
    def choose(i, x):
        return lax.switch(i, [lambda x: x, square, lambda x: x @ x @ x], x)

    assert count_macs(choose, jax.ShapeDtypeStruct((), jnp.int32), spec(3, 3)) == 54
    # Under vmap both branches run for every element.
    indices = jax.ShapeDtypeStruct((5,), jnp.int32)
    assert count_macs(jax.vmap(choose), indices, spec(5, 3, 3)) == 5 * 81


def test_while_is_refused_only_if_it_multiplies():
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def doubled_then_squared(n, x):
        return square(lax.fori_loop(0, n, lambda _, c: c * 2, x))

    assert count_macs(doubled_then_squared, count, spec(3, 3)) == 27
    with pytest.raises(ValueError, match="while loop"):
        count_macs(lambda n, x: lax.fori_loop(0, n, lambda _, c: c @ c, x), count, spec(3, 3))
    with pytest.raises(ValueError, match="while loop"):
        count_macs(
            lambda x: lax.while_loop(lambda c: (c @ c).sum() < 9, lambda c: c + 1, x), spec(3, 3)
        )


def test_ambiguous_primitive_is_refused():
    def solve(a, b):
        return lax.custom_linear_solve(
            lambda x: a @ x, b, lambda f, b: a @ b, transpose_solve=lambda f, b: a @ b
        )

    with pytest.raises(ValueError, match="custom_linear_solve"):
        count_macs(solve, spec(3, 3), spec(3))


@pytest.mark.parametrize("axes", [{"data"}, {"data", "model"}])
def test_shard_map_counts_every_device(axes):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )

    def rows(x):
        return x @ x.T

    sharded = jax.shard_map(
        rows, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=axes
    )
    copies = 2 ** len(axes)
    # Each device: [4, 3] x [3, 4]. A mesh axis that is not manual is left to the compiler.
    assert count_macs(jax.jit(sharded), spec(8, 3)) == copies * 4 * 4 * 3


def test_nothing_to_count():
    assert count_macs(lambda x: jnp.sort(jax.nn.relu(x)).sum(), spec(4, 4)) == 0


def test_arrays_and_shapes_count_alike():
    x = jnp.ones((2, 8, 8, 3))
    w = np.ones((3, 3, 3, 4), np.float32)
    assert count_macs(conv, x, w) == count_macs(conv, spec(*x.shape), spec(*w.shape))


def test_agrees_with_the_compiler():
    """The compiler leaves out taps on padding, so this network pads nothing."""

    def network(x, kernels):
        for kernel, strides, groups in zip(
            kernels, [(1, 1), (2, 2), (1, 1)], [1, 1, 2], strict=True
        ):
            x = conv(x, kernel, strides, feature_group_count=groups)
        return x

    kernels = [spec(3, 3, 3, 8), spec(3, 3, 8, 16), spec(3, 3, 8, 8)]
    images = spec(2, 16, 16, 3)
    cost = jax.jit(network).lower(images, kernels).compile().cost_analysis()
    flops = (cost[0] if isinstance(cost, list) else cost)["flops"]
    assert flops == pytest.approx(2 * count_macs(network, images, kernels), rel=0.01)


def test_count_params():
    tree = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": spec(4), "scale": 1.0, "none": None}
    assert count_params(tree) == 72 + 4 + 1
    assert count_params({}) == 0


# Families of which another network is measured always, and networks that take long to trace.
SLOW = ("resnet34_cifar", "resnet50_cifar", "wrn_28_4_cifar", "wrn_34_10_cifar")


@pytest.mark.parametrize(
    ("name", "experts", "ratio", "size", "params", "pathway"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in SLOW else []) for row in TABLE],
)
def test_published_sizes(name, experts, ratio, size, params, pathway):
    network = CNN(name, num_experts=experts, ratio=ratio)
    cost = network_cost(network, (size, size, 3), 10 if size == 32 else 1000)
    assert cost["params"]["backbone"] == params
    assert cost["macs"]["pathway"] == pathway
    # REFERENCE has the router at 32x32 only; its MACs grow with the area but for the head's.
    router = (40_550_528 - 128) * (size // 32) ** 2 + 128 if experts > 1 else 0
    assert cost["macs"]["router"] == router
    assert cost["params"]["router"] == (269_202 if experts > 1 else 0)
    assert cost["macs"]["total"] == pathway + router
    if ratio == 1.0:
        assert cost["macs"]["dense"] == pathway


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_more_experts_cost_parameters_but_no_macs(scope):
    costs = [
        network_cost(
            CNN("vgg11", num_experts=n, ratio=0.5, width=8, router=RouterSettings(scope, width=4)),
            (32, 32, 3),
            10,
        )
        for n in (2, 5)
    ]
    two, five = costs
    assert two["macs"]["pathway"] == five["macs"]["pathway"]
    assert two["params"]["pathway"] == five["params"]["pathway"]
    assert two["params"]["backbone"] < five["params"]["backbone"]
    assert two["macs"]["router"] < five["macs"]["router"] < two["macs"]["router"] * 1.5


def test_several_choices_cost_several_pathways_of_what_is_expert():
    costs = [
        network_cost(CNN("vgg11", num_experts=3, top_k=k, width=8), (32, 32, 3), 10)
        for k in (1, 2, 3)
    ]
    macs, params = ([c[kind]["pathway"] for c in costs] for kind in ("macs", "params"))
    assert macs[2] - macs[1] == macs[1] - macs[0] > 0.8 * macs[0]
    assert params[2] - params[1] == params[1] - params[0] > 0
    assert params[2] == costs[2]["params"]["backbone"]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("resnet18_cifar", 32, "published"),
        ("vgg16_bn", 64, "published"),
        ("resnet18_imagenet", 224, "at_32"),
        ("densenet_cifar", 32, "at_16"),
        pytest.param("densenet_imagenet", 64, "at_8", marks=pytest.mark.slow),
    ],
)
def test_the_default_router_keeps_within_the_bound(name, size, expected):
    network = CNN(name, num_experts=2, ratio=0.5)
    assert default_router(network, (size, size, 3), 10) == expected
    network = network._replace(router=RouterSettings.of(PRESETS[expected]))
    macs = network_cost(network, (size, size, 3), 10)["macs"]
    assert macs["total"] <= AFFORDABLE * macs["dense"]


def test_in_one_line():
    network = CNN("resnet18_cifar", num_experts=2, ratio=0.5)
    assert describe(network_cost(network, (32, 32, 3), 10)) == (
        "5,834,652 parameters, 192,268,928 MACs per image (router 40,550,528, pathway "
        "151,718,400), 0.346 of the dense network's 555,422,720"
    )
    dense = describe(network_cost(CNN("resnet18_cifar"), (32, 32, 3), 10))
    assert dense == "11,173,962 parameters, 555,422,720 MACs per image"


def test_a_network_that_cannot_be():
    with pytest.raises(UserError, match=r"did you mean 'resnet18_cifar'"):
        network_cost(CNN("resnet18_cifr"), (32, 32, 3), 10)
