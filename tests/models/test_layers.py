"""Convolution against JAX's own, normalisation against PyTorch's conventions in NumPy."""

import re
from functools import partial
from itertools import product

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear, conv2d
from advmoe_jax.parallel import data_mesh, parallel
from advmoe_jax.routing import dispatch


def plain(x, kernel, stride=1, padding=0):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def pair(size, shape=(6, 7), batch=2, seed=0):
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(batch, *shape, 2)), rng.normal(size=(size, size, 2, 3))
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def gradients(convolve):
    """(x, kernel) -> gradients of a loss that weighs every output differently."""

    def loss(x, kernel):
        out = convolve(x, kernel)
        return jnp.sum(jnp.sin(out + jnp.arange(out.size).reshape(out.shape)))

    return jax.grad(loss, argnums=(0, 1))


def assert_same(actual, expected, tolerance=1e-5):
    def one(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

    jax.tree.map(one, actual, expected)


@pytest.mark.parametrize("shape", [(8, 8), (7, 6)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_and_its_gradients(size, shape):
    x, kernel = pair(size, shape)
    settings = list(product((1, 2, 3), (0, 1, 2)))

    @partial(jax.jit, static_argnums=0)
    def everything(convolve, x, kernel):
        bound = [partial(convolve, stride=s, padding=p) for s, p in settings]
        return [(c(x, kernel), gradients(c)(x, kernel)) for c in bound]

    assert_same(everything(conv2d, x, kernel), everything(plain, x, kernel))


@pytest.mark.parametrize(("batch", "stride"), [(64, 1), (66, 2), (67, 1)])
def test_the_kernel_gradient_of_a_large_batch(batch, stride):
    x, kernel = pair(3, batch=batch)
    actual, expected = (
        jax.jit(gradients(partial(convolve, stride=stride, padding=1)))(x, kernel)
        for convolve in (conv2d, plain)
    )
    assert_same(actual, expected)


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
def test_gradients_inside_a_loop(size, stride, padding):
    def ascend(convolve, x, kernel):
        def step(_, carry):
            grads = gradients(partial(convolve, stride=stride, padding=padding))(*carry)
            return jax.tree.map(lambda v, g: v + 0.01 * g, carry, grads)

        return lax.fori_loop(0, 3, step, (x, kernel))

    x, kernel = pair(size)
    assert_same(jax.jit(partial(ascend, conv2d))(x, kernel), ascend(plain, x, kernel))


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_gradients_under_vmap(in_axes):
    stacked = [jnp.stack(v) for v in zip(*(pair(3, seed=s) for s in range(3)), strict=True)]
    args = [v if axis == 0 else v[0] for v, axis in zip(stacked, in_axes, strict=True)]

    def mapped(convolve):
        return jax.jit(jax.vmap(gradients(partial(convolve, stride=2, padding=1)), in_axes))

    assert_same(mapped(conv2d)(*args), mapped(plain)(*args))


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map(check_vma):
    x, kernel = pair(3, batch=8)

    def mapped(convolve):
        function = partial(convolve, padding=1)
        return jax.jit(
            jax.shard_map(
                lambda x, k: jax.tree.map(lambda g: g[None], gradients(function)(x, k)),
                mesh=data_mesh(8),
                in_specs=(P("data"), P()),
                # With the check, gradients of what is replicated are summed, hence replicated.
                out_specs=(P("data"), P() if check_vma else P("data")),
                check_vma=check_vma,
            )
        )

    assert_same(mapped(conv2d)(x, kernel), mapped(plain)(x, kernel))


def test_other_platforms_keep_the_gradients_of_jax():
    def lowered(convolve, *platforms):
        function = jax.jit(gradients(partial(convolve, stride=2, padding=1)))
        text = function.trace(*pair(3)).lower(lowering_platforms=platforms).as_text()
        return sorted(re.findall(r"dim_numbers = (.*?), window", text))

    for platforms in [("tpu", "cuda"), ("tpu",), ("cuda",)]:
        assert lowered(conv2d, *platforms) == lowered(plain, *platforms)
    # The test can tell: on the CPU all layouts are one, and differ from those of JAX.
    assert len(set(lowered(conv2d, "cpu"))) == 1
    assert len(set(lowered(plain, "cpu"))) == 3


def test_convolution_computes_in_the_dtype_of_images():
    x, kernel = pair(3)
    out = conv2d(x.astype(jnp.bfloat16), kernel)
    assert out.dtype == jnp.bfloat16
    grads = jax.grad(
        lambda x, k: jnp.sum(conv2d(x.astype(jnp.bfloat16), k).astype(jnp.float32)), (0, 1)
    )(x, kernel)
    assert [g.dtype for g in grads] == [jnp.float32] * 2
    np.testing.assert_allclose(out.astype(jnp.float32), plain(x, kernel), atol=0.15)


def normalised(x, context, channels):
    """One call of a BatchNorm with uncommon parameters: (y, running mean, running variance)."""
    ramp = jnp.arange(1.0, channels + 1)
    norm = BatchNorm(channels)
    norm.scale[...], norm.bias[...] = 0.5 * ramp, -ramp
    norm.mean[...], norm.var[...] = 0.1 * ramp, 2 * ramp
    y = norm(x, context)
    return y, norm.mean[...], norm.var[...]


def reference(x, train):
    """BatchNorm of ``normalised`` in float64, after PyTorch's documentation."""
    x = np.asarray(x, np.float64)
    ramp = np.arange(1.0, x.shape[-1] + 1)
    mean, var = 0.1 * ramp, 2 * ramp
    new_mean, new_var = mean, var
    if train:
        new_mean = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
        new_var = 0.9 * var + 0.1 * x.var((0, 1, 2), ddof=1)
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(var + 1e-5) * 0.5 * ramp - ramp, new_mean, new_var


def images(batch, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(3 + 2 * rng.normal(size=(batch, 3, 2, 4)), jnp.float32)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_follows_the_conventions_of_pytorch(train):
    x = images(5)
    assert_close(normalised(x, Context(train=train), 4), reference(x, train))


def test_batch_norm_of_values_far_from_zero():
    x = images(5) + 1000
    y = normalised(x, Context(train=True), 4)[0]
    np.testing.assert_allclose(y, reference(x, True)[0], atol=2e-3)


def test_batch_norm_keeps_the_dtype_and_float32_statistics():
    y, mean, var = normalised(images(5).astype(jnp.bfloat16), Context(train=True), 4)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_padding_does_not_count():
    x = images(5)
    plan = dispatch.plan(jnp.array([[2], [0], [2], [0], [2]]), 3, 4)
    assert not plan.valid.all()
    rows = jnp.where(plan.valid[:, None, None, None], dispatch.gather(x, plan), 1e3)
    weights = jnp.ones((5, 1))
    y, *stats = normalised(rows, Context(True, None, plan, weights, True), 4)
    assert_close((y[plan.position[:, 0]], *stats), reference(x, True))


def test_rows_do_not_mask_unsorted_images():
    x = images(5)
    plan = dispatch.plan(jnp.array([[2, 1], [0, 1], [2, 0], [0, 1], [2, 1]]), 3, 4)
    context = Context(True, None, plan, jnp.ones((5, 2)), False)
    assert_close(normalised(x, context, 4), reference(x, True))


@pytest.mark.parametrize("is_sorted", [False, True])
def test_statistics_are_those_of_all_devices(is_sorted):
    x = images(24)
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 2, (24, 1)))
    probe = images(24, seed=1)

    def forward(x, indices, axis_name):
        if not is_sorted:
            return normalised(x, Context(True, axis_name), 4)
        plan = dispatch.plan(indices, 2, 2)
        context = Context(True, axis_name, plan, jnp.ones(indices.shape), True)
        y, mean, var = normalised(dispatch.gather(x, plan), context, 4)
        return y[plan.position[:, 0]], mean, var

    def with_gradient(axis_name, x, indices, probe):
        def loss(x):
            out = forward(x, indices, axis_name)
            return jnp.sum(out[0] * probe), out

        return jax.grad(loss, has_aux=True)(x)

    mapped = jax.shard_map(
        partial(with_gradient, "data"),
        mesh=data_mesh(8),
        in_specs=P("data"),
        out_specs=(P("data"), (P("data"), P(), P())),
        check_vma=False,
    )
    gradient, out = jax.jit(mapped)(x, indices, probe)
    whole_gradient, whole = jax.jit(partial(with_gradient, None))(x, indices, probe)
    assert_close(out, whole)
    assert_close(out, reference(x, True))
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-4, atol=1e-5)


def on_devices(function):
    """``function`` of a batch that eight devices share, each of them with its own part."""
    spec = P("data")
    return parallel(function, data_mesh(8), in_specs=spec, out_specs=spec)


def test_devices_agree_on_values_far_from_the_running_mean():
    x = images(24) + 30  # 15 standard deviations
    y = on_devices(lambda x: normalised(x, Context(True, "data"), 4)[0])(x)
    np.testing.assert_allclose(y, reference(x, True)[0], atol=1e-3)


def test_devices_that_see_one_value_alone_give_a_variance_of_zero():
    x = jnp.full((24, 3, 2, 4), 0.3)
    y = on_devices(lambda x: normalised(x, Context(True, "data"), 4)[0])(x)
    np.testing.assert_allclose(y, jnp.broadcast_to(-jnp.arange(1.0, 5), x.shape), atol=1e-3)


def test_one_sum_over_devices_there_and_one_back():
    def forward(x):
        return jnp.sin(normalised(x, Context(True, "data"), 4)[0])

    both = jax.grad(lambda x: jnp.sum(forward(x)))
    for function, sums in ((on_devices(forward), 1), (on_devices(both), 2)):
        assert function.lower(images(24)).as_text().count("stablehlo.all_reduce") == sums


def test_running_statistics_carry_no_gradient():
    def moved(x):
        _, mean, var = normalised(x, Context(train=True), 4)
        return jnp.sum(mean + var)

    assert not np.any(jax.grad(moved)(images(5)))


def test_convolutions_start_he_normal_over_the_fan_out():
    kernel = np.asarray(Conv(32, 128, 3, rngs=nnx.Rngs(0)).kernel[...])
    assert kernel.shape == (3, 3, 32, 128) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 128)), rtol=0.02)
    assert abs(kernel.mean()) < 0.01 * kernel.std()
    assert np.abs(kernel).max() > 3.5 * kernel.std()  # not truncated


def test_linear_layers_start_at_normal_0_01():
    layer = Linear(400, 200, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer.kernel[...].std(), 0.01, rtol=0.02)
    assert not np.any(layer.bias[...])


def test_linear_is_float32():
    layer = Linear(4, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([1.0, -2.0], jnp.bfloat16)
    x = jnp.ones((3, 4), jnp.bfloat16)
    out = layer(x)
    assert out.dtype == jnp.float32
    kernel = np.asarray(layer.kernel[...].astype(jnp.float32), np.float64)
    np.testing.assert_allclose(out, np.ones((3, 4)) @ kernel + [1, -2], rtol=1e-6)


def test_conv_module_strides_and_pads():
    layer = Conv(2, 3, 3, 2, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, _ = pair(3)
    out = layer(x, Context())
    assert out.dtype == jnp.bfloat16
    expected = plain(x, layer.kernel[...], 2, 1)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.1)
