"""One device, eight devices, other platforms: the same step."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from advmoe_jax.attacks import linf, pgd
from advmoe_jax.data.batch import BatchRecipe, Mixture, permutation
from advmoe_jax.data.pipeline import Resident
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.models import ViT, functional
from advmoe_jax.parallel import (
    DATA_AXIS,
    EXPERT_AXIS,
    check_batch,
    data_mesh,
    distribute,
    distributed_shapes,
    parallel,
    replicate,
    state_specs,
)
from advmoe_jax.training import loop, methods
from advmoe_jax.training.balance import Balance
from advmoe_jax.training.checkpoint import Checkpointer, tree_sha256
from advmoe_jax.training.optimizers import OptimizerSettings, create_optimizer
from advmoe_jax.training.state import create_state

BATCH, IMAGES = 32, 96


# Everything that an improved recipe may use.
RECIPE = {
    "label_smoothing": 0.1,
    "awp": 0.01,
    "ema_decay": 0.5,
    "balance": Balance(importance=0.1, load=0.1, switch=0.1, noise=0.3, warmup_steps=2),
}
EXTRA = 16


def make_task(network, mesh, method, objective="pathway", recipe=None, optimizers=None):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(IMAGES, 8, 8, 1)).astype(np.uint8)
    split = Split(images, rng.integers(4, size=IMAGES).astype(np.int32))
    optimizers = optimizers or dict.fromkeys(network.parts, optax.sgd(0.05, momentum=0.9))
    loss = methods.METHODS[method].attack_loss
    attack = pgd(linf(0.1), num_steps=2, step_size=0.05, loss=loss,
                 start="gaussian" if loss == "kl" else "uniform")  # fmt: skip
    settings = methods.Settings(router_objective=objective, **(recipe or {}))
    mixture = Mixture(EXTRA, 8, cutmix=0.5, num_classes=4) if recipe else Mixture()
    task = loop.Task(
        step=methods.create_step(method, network, optimizers, attack, settings, mesh.axis_names),
        feed=Resident(split, mesh, BatchRecipe(BATCH, 1, True, mixture)),
        validate=None,
        selected_by="robust_accuracy",
        num_epochs=2,
        order_key=jax.random.key(1),
        step_key=jax.random.key(2),
        expert_parameters=network.expert_parameters,
    )
    return task, optimizers


def train(tiny, num_devices, steps, method, objective="pathway", recipe=None):
    network, params, stats = tiny(num_experts=3)
    task, optimizers = make_task(network, data_mesh(num_devices), method, objective, recipe)
    state = create_state(params, stats, optimizers, averaged=bool(recipe))
    carry, losses = run(task, data_mesh(num_devices), state, steps)
    return carry.state, losses


def run(task, mesh, state, steps):
    """The carry after the first step, made again and again; the metrics."""
    carry = loop.first_carry(task, state, mesh)
    order = replicate(permutation(task.order_key, task.feed.images_per_epoch), mesh)
    losses = []
    for _ in range(steps):
        (data,) = task.feed.batches(task.order_key, task.step_key, 0, 1)
        carry, metrics = loop.train_step(task.program, mesh, carry, data, order, task.step_key)
        losses.append(jax.device_get(metrics))
    return carry, losses


@pytest.mark.parametrize(
    ("method", "objective", "recipe"),
    [
        ("standard", "pathway", None),
        ("advmoe", "pathway", None),
        pytest.param("advmoe", "assignment", RECIPE, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_losses_and_parameters_of_one(tiny, method, objective, recipe):
    steps = 3 if recipe else 5  # two with random routes, and one that follows the router
    one, losses_of_one = train(tiny, 1, steps, method, objective, recipe)
    eight, losses_of_eight = train(tiny, 8, steps, method, objective, recipe)
    # AWP and CutMix let one rounded sign of an attack's gradient reach further.
    tolerance = 1e-3 if recipe else 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance),
        (jax.device_get(one), losses_of_one),
        (jax.device_get(eight), losses_of_eight),
    )
    # Every device holds the same bits.
    for leaf in jax.tree.leaves(eight):
        shards = [np.asarray(s.data) for s in leaf.addressable_shards]
        assert len(shards) == 8
        assert all((shard == shards[0]).all() for shard in shards)


@pytest.mark.slow
def test_one_device_and_two_drift_apart_by_rounding_alone(tiny):
    """Measured: 1e-8 after a step, 5e-6 after ten, 1e-4 after thirty, 1e-3 after sixty."""
    for steps, tolerance in ((5, 1e-6), (30, 2e-3)):
        (one, losses), (two, others) = (train(tiny, n, steps, "advmoe") for n in (1, 2))
        for a, b in zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
        found = [[metrics["loss"] for metrics in run] for run in (losses, others)]
        np.testing.assert_allclose(*found, rtol=0, atol=tolerance)


def tokens(num_experts=3, placement="0,1"):
    """A V-MoE of two blocks, or of one, whose every part is random in training."""
    layers = len(placement.split(","))
    size = {"patch": 4, "layers": layers, "width": 8, "hidden": 12, "heads": 2}
    size["placement"] = placement
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "expert_dropout": 0.1}
    settings = ViT(
        "vit_tiny_8", num_experts=num_experts, top_k=2, dispatch="every", **size, **rates
    )
    network, params, stats = functional(
        settings.create(in_channels=1, num_classes=4, rngs=nnx.Rngs(0))
    )
    head = jax.random.normal(jax.random.key(1), (8, 4))
    params["experts"]["head"]["kernel"] = 0.3 * head
    return network, params, stats


@pytest.mark.parametrize("method", ["standard", pytest.param("advmoe", marks=pytest.mark.slow)])
def test_eight_devices_equal_one_where_tokens_are_routed(method):
    recipe = {"balance": Balance(importance=0.1, load=0.1, noise=0.3), "ema_decay": 0.5}
    one, losses_of_one = train(tokens, 1, 2, method, recipe=recipe)
    eight, losses_of_eight = train(tokens, 8, 2, method, recipe=recipe)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        (jax.device_get(one), losses_of_one),
        (jax.device_get(eight), losses_of_eight),
    )


# So small a norm that every gradient is clipped.
SGD = OptimizerSettings("sgd", 0.05, schedule="constant", clip_norm=0.1)
ADAMW = SGD._replace(name="adamw", learning_rate=1e-3)
OF_TOKENS = {
    "awp": 0.01,
    "ema_decay": 0.5,
    "balance": Balance(importance=0.1, load=0.1, noise=0.3, shared_steps=0.3),
}


def sharded_task(mesh, method="at", settings=SGD, recipe=None):
    """A small V-MoE's task and first state; its experts are on the axis that the mesh may have."""
    network, params, stats = tokens(4, "0")
    has_axis = EXPERT_AXIS in mesh.axis_names
    optimizers = {
        part: create_optimizer(part, settings, 10, 1, network.stacked[part] if has_axis else None)
        for part in network.parts
    }
    task, _ = make_task(network, mesh, method, recipe=recipe, optimizers=optimizers)
    return task, create_state(params, stats, optimizers, averaged=bool(recipe))


@pytest.mark.parametrize(
    ("method", "settings", "recipe"),
    [
        ("at", ADAMW, OF_TOKENS),
        ("advmoe", SGD, None),
    ],
)
@pytest.mark.slow
def test_spread_experts_train_as_whole_ones(method, settings, recipe):
    found = []
    for shards in (1, 2):
        mesh = data_mesh(4, shards)
        task, state = sharded_task(mesh, method, settings, recipe)
        found.append(run(task, mesh, state, 3))
    # The gradient of a key's bias in attention is rounding alone, which AdamW takes at full length.
    atol = 1e-5 if settings.name == "sgd" else 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), *jax.device_get(found)
    )
    spread = found[1][0].state
    kernels = [spread.params, *(x for x in (spread.average, spread.opt_state) if x is not None)]
    names = task.expert_parameters
    parts = [
        (leaf.shape[0], leaf.addressable_shards[0].data.shape[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(kernels)
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith(names)
    ]
    # Parameters, momentum (two of AdamW) and the average: kernels and biases of two layers each.
    assert parts == [(4, 2)] * (4 * (2 if recipe is None else 4))


def test_checkpoints_are_restored_on_other_shards(tmp_path):
    task, state = sharded_task(data_mesh(4), settings=ADAMW)
    saved = tree_sha256(state)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for shards in (4, 1, 2):
            mesh = data_mesh(4, shards)
            specs = state_specs(state, task.expert_parameters, mesh)
            if shards == 4:
                checkpointer.save(1, distribute(state, specs, mesh), None)
            like = distributed_shapes(state, specs, mesh)
            restored = checkpointer.restore_latest(like)[1]
            same = jax.tree.map(lambda a, b: a.sharding == b.sharding, like, restored)
            assert jax.tree.all(same) and tree_sha256(restored) == saved


@pytest.mark.parametrize(("shards", "method"), [(1, "advmoe"), (2, "at")])
def test_the_step_on_tokens_lowers_for_accelerators(shards, method):
    mesh = data_mesh(4, shards)
    task, state = sharded_task(mesh, method)
    carry = loop.first_carry(task, state, mesh)
    order = jnp.arange(IMAGES, dtype=jnp.int32)
    arguments = (task.program, mesh, carry, task.feed.data, order, task.step_key)
    traced = loop.train_step.trace(*arguments)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "dot_general" in text and ("all_to_all" in text) == (shards > 1)


@pytest.mark.slow
def test_a_step_repeats_bit_for_bit(tiny):
    first, second = (train(tiny, 8, 2, "advmoe")[0] for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))


@pytest.mark.parametrize("method", ["advmoe", pytest.param("at", marks=pytest.mark.slow)])
def test_the_step_lowers_for_accelerators(tiny, method):
    mesh = data_mesh(8)
    network, params, stats = tiny()
    task, optimizers = make_task(network, mesh, method)
    state = create_state(params, stats, optimizers)
    carry = loop.first_carry(task, state, mesh)
    order = jnp.arange(IMAGES, dtype=jnp.int32)
    data = task.feed.data
    traced = loop.train_step.trace(task.program, mesh, carry, data, order, task.step_key)
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # The layout in which JAX derives the gradient to a kernel; the form for CPUs never has it.
        assert "dim_numbers = [f, 0, 1, b]" in text
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "dim_numbers = [f, 0, 1, b]" not in on_cpu


def test_parallel_splits_by_axis_and_donates():
    mesh = data_mesh(4)
    double = parallel(
        lambda x, y: x + jax.lax.psum(y, DATA_AXIS),
        mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS)),
        donate=(0,),
    )
    x = replicate(jnp.zeros(1), mesh)
    np.testing.assert_array_equal(double(x, jnp.arange(4.0)), [6.0])
    assert x.is_deleted()


def test_replicas_do_not_share_memory():
    leaf = replicate(np.arange(5.0), data_mesh(8))
    pointers = {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
    assert len(pointers) == 8


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"batch_size=12.*8 devices.*try 8"):
        check_batch("batch_size", 12, data_mesh(8))
    with pytest.raises(UserError, match="batch_size=0"):
        check_batch("batch_size", 0, data_mesh(1))
    check_batch("batch_size", 16, data_mesh(8))
    with pytest.raises(UserError, match="num_devices=99"):
        data_mesh(99)
    with pytest.raises(UserError, match=r"expert_shards=6 does not divide the 8 devices: set.* 2,"):
        data_mesh(8, 6)
