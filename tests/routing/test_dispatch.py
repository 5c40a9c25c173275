"""Dispatch against computing every expert and selecting."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from advmoe_jax import target
from advmoe_jax.parallel import data_mesh
from advmoe_jax.routing import dispatch

make_plan = jax.jit(dispatch.plan, static_argnums=(1, 2))

CASES = {  # name: indices [B, k], experts, block
    "top-1": ([[0], [2], [1], [2], [0], [2], [1]], 3, 2),
    "top-2": ([[0, 1], [2, 1], [1, 0], [2, 0], [0, 2]], 3, 2),
    "top-N": ([[1, 0, 2], [2, 1, 0], [0, 1, 2]], 3, 2),
    "block larger than the batch": ([[0], [1], [1]], 2, 16),
    "block of one": ([[1], [0], [1]], 2, 1),
    "one expert empty": ([[0], [2], [2], [0]], 3, 2),
    "all to one": ([[1], [1], [1], [1], [1]], 3, 2),
    "one image": ([[1]], 2, 4),
}


def expert(rows, kernel, bias):
    return jnp.tanh(rows @ kernel + bias)


def dispatched(samples, kernel, bias, weights, indices, block):
    plan = dispatch.plan(indices, len(kernel), block)
    rows = dispatch.gather(samples, plan)
    rows = dispatch.map_experts(expert, rows, plan, (kernel, bias))
    return dispatch.combine(rows, plan, weights)


def by_strategy(samples, kernel, bias, weights, indices, block, strategy):
    plan = dispatch.Every(indices)
    if strategy == "blocks":
        plan = dispatch.plan(indices, len(kernel), block)
    return dispatch.apply_experts(expert, samples, plan, weights, (kernel, bias))


def computed_by_all(samples, kernel, bias, weights, indices):
    everything = jax.vmap(expert, (None, 0, 0))(samples, kernel, bias)
    chosen = everything[indices, jnp.arange(len(samples))[:, None]]
    return jnp.sum(chosen * weights[..., None], axis=1)


def arguments(indices, experts, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(len(indices), 4), (experts, 4, 5), (experts, 5), np.shape(indices)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@settings(deadline=None, max_examples=25)
@given(
    shape=st.sampled_from(
        [(1, 1, 1, 2), (6, 1, 4, 2), (8, 2, 3, 4), (7, 1, 2, 16), (5, 3, 5, 3), (9, 1, 3, 1)]
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_plan(shape, seed):
    batch, k, experts, block = shape
    rng = np.random.default_rng(seed)
    indices = np.argsort(rng.random((batch, experts)))[:, :k]
    plan = jax.tree.map(np.asarray, make_plan(jnp.asarray(indices), experts, block))
    block = min(block, batch * k)
    assert len(plan.source) == len(plan.choice) == len(plan.valid)
    assert len(plan.source) == len(plan.block_expert) * block <= batch * k + experts * (block - 1)

    rows = np.flatnonzero(plan.valid)
    pairs = list(zip(plan.source[rows], plan.choice[rows], strict=True))
    assert len(rows) == batch * k
    assert set(pairs) == {(b, c) for b in range(batch) for c in range(k)}
    for row, (sample, choice) in zip(rows, pairs, strict=True):
        assert plan.position[sample, choice] == row
        assert plan.block_expert[row // block] == indices[sample, choice]
    for e in range(experts):
        order = [pair for row, pair in zip(rows, pairs, strict=True) if indices[pair] == e]
        assert order == sorted(order)
    # Rows of padding read a sample that exists.
    assert plan.source.min() >= 0 and plan.source.max() < batch
    assert plan.block_expert.min() >= 0 and plan.block_expert.max() < experts


@pytest.mark.parametrize("total", range(1, 8))
@pytest.mark.parametrize("experts", range(1, 5))
def test_num_blocks_is_the_worst_case(total, experts):
    def splits(samples, parts):
        if parts == 1:
            return [(samples,)]
        heads = range(samples + 1)
        return [(n, *rest) for n in heads for rest in splits(samples - n, parts - 1)]

    for block in (1, 2, 3, 8):
        needed = max(sum(-(-n // block) for n in split) for split in splits(total, experts))
        assert dispatch.num_blocks(total, experts, block) == needed


def test_worst_routing_fills_every_block():
    plan = make_plan(jnp.array([[0], [1], [2], [2], [2], [2]]), 3, 3)
    assert plan.valid.reshape(-1, 3).any(axis=1).all()
    assert plan.block_expert.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("strategy", ["blocks", "every"])
@pytest.mark.parametrize(("indices", "experts", "block"), CASES.values(), ids=CASES)
def test_equals_computing_every_expert(indices, experts, block, strategy):
    indices = jnp.array(indices)
    args = arguments(indices, experts)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=(len(indices), 5)), jnp.float32)

    def forward_and_gradients(function):
        def loss(*args):
            out = function(*args)
            return jnp.sum(out * probe), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*args)

    (_, out), grads = forward_and_gradients(
        partial(by_strategy, indices=indices, block=block, strategy=strategy)
    )
    (_, ref), ref_grads = forward_and_gradients(partial(computed_by_all, indices=indices))
    np.testing.assert_allclose(out, ref, rtol=1e-6, atol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, ref_grads)
    unused = sorted(set(range(experts)) - set(np.asarray(indices).ravel().tolist()))
    assert not np.any(grads[1][jnp.array(unused, int)])


def test_blocks_that_are_not_needed_are_skipped():
    plan = make_plan(jnp.zeros((6, 1), int), 3, 2)
    assert plan.used.tolist() == [True, True, True, False]
    rows = dispatch.gather(jnp.ones((6, 4)), plan)
    out = dispatch.map_blocks(lambda expert, block: block + 1, plan, rows)
    in_use = jnp.repeat(plan.used, 2)[:, None]
    np.testing.assert_array_equal(out, jnp.broadcast_to(jnp.where(in_use, 2, 0), out.shape))


def test_the_block_grows_with_the_images_of_an_expert():
    sizes = [dispatch.choose_block(batch, 4) for batch in (8, 128, 4096)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert dispatch.choose_block(1, 4) <= dispatch.choose_block(128, 1)


def test_auto_computes_every_expert_only_where_that_costs_less(monkeypatch):
    costs = {"image": {"4": 1.0, "every": 0.4}, "image in training": {"4": 1.0, "every": 0.6}}
    monkeypatch.setattr(dispatch, "_ROW_COSTS", {"gpu": costs | {"token": {"4": 1.0}}})
    chosen = partial(dispatch.choose_strategy, "auto", 100)
    with target.traced_for("gpu"):
        assert chosen(2) == "every"  # 0.4 * 200 rows against 103
        assert chosen(3) == "blocks"  # 0.4 * 300 rows against 104.5
        assert chosen(2, per="image in training") == "blocks"
        assert chosen(2, per="token") == "blocks"  # nobody has measured it
        assert dispatch.choose_strategy("every", 100, 3) == "every"
    assert chosen(2) == "every"  # what nobody has a table for is taken for a GPU


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_every_platform_has_a_table_that_says_where_it_is_from(name):
    table = json.loads(Path(dispatch.__file__).with_name("row_costs.json").read_text())[name]
    assert table["found"] and {"image", "token"} <= set(table)
    with target.traced_for(name):
        for per in ("image", "image in training", "token"):
            assert dispatch.choose_block(4096, 2, per) >= dispatch.choose_block(8, 2, per)
            assert dispatch.choose_strategy("auto", 512, 16, per=per) == "blocks"


def test_few_experts_are_all_computed_in_training_on_a_tpu():
    with target.traced_for("tpu"):
        for experts, strategy in ((2, "every"), (16, "blocks")):
            assert (
                dispatch.choose_strategy("auto", 512, experts, per="image in training") == strategy
            )
        assert dispatch.choose_strategy("auto", 512, 2) == "blocks"


def test_a_slice_for_the_tpu_has_the_layout_of_an_array_of_its_own():
    def loss(kernel, images):
        plan = dispatch.plan(jnp.zeros((4, 1), int), 2, 2)
        rows = dispatch.gather(images, plan)
        return jnp.sum(dispatch.map_experts(jnp.matmul, rows, plan, (kernel,)) ** 2)

    args = jnp.ones((2, 3, 5)), jnp.ones((4, 3))
    with target.traced_for("tpu"):
        there = jax.make_jaxpr(jax.grad(loss))(*args)
        on_tpu = jax.grad(loss)(*args)  # the constraint holds on any platform, and changes no value
    here = jax.make_jaxpr(jax.grad(loss))(*args)
    assert "layout_constraint" in str(there) and "layout_constraint" not in str(here)
    np.testing.assert_array_equal(on_tpu, jax.grad(loss)(*args))


def test_without_jit():
    indices, experts, block = CASES["top-2"]
    args = [*arguments(indices, experts), jnp.array(indices)]
    np.testing.assert_allclose(dispatched(*args, block), computed_by_all(*args), atol=1e-6)


def test_row_weights_belong_to_their_rows():
    indices = jnp.array(CASES["top-2"][0])
    weights = jnp.arange(indices.size, dtype=jnp.float32).reshape(indices.shape)
    plan = make_plan(indices, 3, 2)
    rows = dispatch.row_weights(weights, plan)
    np.testing.assert_array_equal(rows[plan.position], weights)


def test_combine_keeps_the_dtype_of_rows():
    plan = make_plan(jnp.array([[0], [1]]), 2, 1)
    rows = jnp.ones((2, 3), jnp.bfloat16)
    assert dispatch.combine(rows, plan, jnp.ones((2, 1))).dtype == jnp.bfloat16


def test_under_vmap():
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.integers(0, 3, (4, 5, 1)))
    args = jax.tree.map(
        lambda *a: jnp.stack(a), *(arguments(i, 3, s) for s, i in enumerate(indices))
    )
    out = jax.jit(jax.vmap(partial(dispatched, block=2)))(*args, indices)
    np.testing.assert_allclose(out, jax.vmap(computed_by_all)(*args, indices), atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_every_device_sorts_its_own_shard(check_vma):
    rng = np.random.default_rng(0)
    indices = jnp.asarray(rng.integers(0, 3, (24, 1)))
    samples, kernel, bias, weights = arguments(indices, 3)

    def loss(samples, kernel, bias, weights, indices):
        out = dispatched(samples, kernel, bias, weights, indices, 2)
        return jnp.sum(out**2), out

    def local(*args):
        gradient, out = jax.grad(loss, has_aux=True)(*args)
        return out, gradient, dispatch.plan(args[-1], 3, 2)

    d, r = P("data"), P()
    mapped = jax.jit(
        jax.shard_map(
            local, mesh=data_mesh(8), in_specs=(d, r, r, d, d), out_specs=d, check_vma=check_vma
        )
    )
    args = samples, kernel, bias, weights, indices
    out, gradient, plan = mapped(*args)
    ref = computed_by_all(*args)
    np.testing.assert_allclose(out, ref, atol=1e-6)
    ref_gradient = jax.grad(lambda s: jnp.sum(computed_by_all(s, *args[1:]) ** 2))(samples)
    np.testing.assert_allclose(gradient, ref_gradient, rtol=1e-5, atol=1e-5)
    assert plan.source.max() < 3
    assert plan.valid.reshape(8, -1).sum(axis=1).tolist() == [3] * 8


def test_gradients_of_experts_in_16_bits_do_not_lose_what_many_blocks_add():
    rows, experts = 4096, 2
    x = jax.random.uniform(jax.random.key(0), (rows, 8))
    kernels = jnp.ones((experts, 8, 4))
    indices = (jnp.arange(rows) % experts)[:, None]

    def gradient(dtype, block):
        plan = dispatch.arrange(indices, experts, strategy="blocks", block_size=block)

        def total(kernels):
            ones = jnp.ones((rows, 1), dtype)
            out = dispatch.apply_experts(
                lambda block, kernel: block @ kernel, x.astype(dtype), plan, ones, (kernels,)
            )
            return jnp.sum(out.astype(jnp.float32))

        return np.asarray(jax.grad(total)(kernels.astype(dtype)), np.float32)

    expected = gradient(jnp.float32, 8)
    for block in (8, 256):  # what is left is the rounding of the products
        np.testing.assert_allclose(gradient(jnp.bfloat16, block), expected, rtol=8e-3)
