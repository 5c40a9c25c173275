"""The functional form: pure, routed for real, and the same by every way of computing it."""

import gc
import weakref
from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models.layers import BatchNorm, Conv, Linear
from advmoe_jax.models.model import Model
from advmoe_jax.models.moe import MoEConv
from advmoe_jax.models.network import functional
from advmoe_jax.models.output import Normalize
from advmoe_jax.models.registry import model as by_name
from advmoe_jax.models.resnet import ResidualBlock
from advmoe_jax.models.router import Router
from advmoe_jax.routing.choice import Routing

EXPERTS, BATCH = 3, 7


class Backbone(nnx.Module):
    """The smallest network with a stem, expert convolutions, a projection and a head."""

    def __init__(self, num_experts, rngs):
        types = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.stem = Conv(1, 4, 3, 1, 1, rngs=rngs)
        self.bn = BatchNorm(4)
        self.block = ResidualBlock(4, 3, 2, bottleneck=False, num_experts=num_experts, **types)
        self.head = Linear(3, 5, rngs=rngs)

    def __call__(self, x, context):
        x = jax.nn.relu(self.bn(self.stem(x, context), context))
        return self.head(jnp.mean(self.block(x, context), axis=(1, 2)))


class OneLayer(nnx.Module):
    """One expert convolution and nothing else: its output is linear in the gate's weights."""

    def __init__(self, num_experts, rngs):
        self.conv = MoEConv(1, 5, 3, 1, 1, num_experts=num_experts, rngs=rngs)

    def __call__(self, x, context):
        return jnp.mean(self.conv(x, context), axis=(1, 2))


def build(num_experts=EXPERTS, backbone=Backbone, **settings):
    rngs = nnx.Rngs(0)
    router = Router(1, num_experts, width=4, blocks=1, rngs=rngs) if num_experts > 1 else None
    normalize = Normalize((0.4,), (0.3,))
    settings = {"block_size": 2} | settings
    model = backbone(num_experts, rngs)
    return Model(normalize, model, router, num_experts=num_experts, **settings)


def network(num_experts=EXPERTS, seed=0, **settings):
    """(network, params, stats) with values at which every part of the network matters."""
    net, params, stats = functional(nnx.eval_shape(lambda: build(num_experts, **settings)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.8, 0.8)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return net, *jax.tree_util.tree_map_with_path(draw, (params, stats))


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).random((BATCH, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def routed():
    """A network whose router is balanced so that the images take every pathway."""
    return network()


@pytest.fixture(scope="module")
def apply(routed):
    return jax.jit(routed[0].apply, static_argnames="train")


@pytest.fixture(scope="module")
def spread(routed, apply, images):
    """Parameters with which the batch of images takes all pathways."""
    _, params, stats = routed
    scores = apply(params, stats, images)[0].routing.scores[:, 0]
    head = params["router"]["head"]
    scale = 1 / jnp.std(scores, axis=0)
    bias = (head["bias"] - jnp.mean(scores, axis=0)) * scale
    head = {"kernel": head["kernel"] * scale, "bias": bias}
    params = params | {"router": params["router"] | {"head": head}}
    chosen = apply(params, stats, images)[0].routing.indices
    assert len(np.unique(chosen)) == EXPERTS
    return params


def force(expert, batch=BATCH):
    indices = jnp.full((batch, 1, 1), expert, jnp.int32)
    return Routing(indices, jnp.ones((batch, 1, 1)), jnp.zeros((batch, 1, EXPERTS)))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return [np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]


def test_parts(routed):
    net, params, stats = routed
    assert set(net.parts) == {"router", "experts"} and net.decisions == ("image",)
    stacked = {p[-2].key for p, flag in jax.tree.leaves_with_path(net.stacked) if flag}
    assert stacked == {"conv1", "conv2"}
    for tree in (params, stats):
        assert set(tree) == {"router", "experts"}
        assert jax.tree.leaves(tree["router"]) and jax.tree.leaves(tree["experts"])
    assert set(params["experts"]) == {"stem", "bn", "block", "head"}
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(stats)} == {"mean", "var"}


def test_dense(images):
    net, params, stats = network(1)
    assert net.parts == tuple(params) == tuple(stats) == ("backbone",) and not net.is_moe
    assert net.decisions == () == net.score_shape
    output, after = jax.jit(net.apply)(params, stats, images)
    assert output.routing is None and output.logits.shape == (BATCH, 5)
    assert all(equal(after, stats))
    routing, after = net.route(params, stats, images)
    assert routing is None and all(equal(after, stats))


@pytest.mark.parametrize("train", [False, True])
def test_apply_is_pure(routed, apply, images, train):
    _, params, stats = routed
    before = jax.tree.map(np.array, (params, stats, images))
    first = apply(params, stats, images, train=train)
    assert all(equal((params, stats, images), before))
    assert all(equal(apply(params, stats, images, train=train), first))


def test_statistics_change_in_training_only(routed, apply, images):
    _, params, stats = routed
    assert all(equal(apply(params, stats, images, train=False)[1], stats))
    after = apply(params, stats, images, train=True)[1]
    assert not any(equal(after, stats))


def test_without_jit(images):
    net, params, stats = network(1)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        net.apply(params, stats, images, train=True),
        jax.jit(partial(net.apply, train=True))(params, stats, images),
    )


def test_forced_routing_is_followed(routed, apply, images, spread):
    _, params, stats = routed
    for train in (False, True):
        output, after = apply(spread, stats, images, train=train, routing=force(2))
        assert all(equal(output.routing, force(2)))
        assert all(equal(after["router"], stats["router"]))
        # The parameters of the router play no part.
        again, _ = apply(params, stats, images, train=train, routing=force(2))
        np.testing.assert_array_equal(output.logits, again.logits)
        if train:
            assert not any(equal(after["experts"], stats["experts"]))


def test_equals_every_pathway_alone_then_choosing(routed, apply, images, spread):
    _, _, stats = routed
    output, _ = apply(spread, stats, images)
    pathways = jnp.stack(
        [apply(spread, stats, images, routing=force(e))[0].logits for e in range(EXPERTS)]
    )
    chosen = pathways[output.routing.indices[:, 0, 0], jnp.arange(BATCH)]
    np.testing.assert_allclose(output.logits, chosen, rtol=1e-5, atol=1e-6)
    # The pathways differ, or this would show nothing.
    assert np.abs(pathways[0] - pathways[1]).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("train", [pytest.param(False, marks=pytest.mark.slow), True])
def test_strategies_agree(routed, images, spread, train):
    _, _, stats = routed
    labels = jnp.arange(BATCH) % 5

    def forward_and_gradients(strategy):
        net = network(strategy=strategy)[0]

        def loss(params, images):
            output, after = net.apply(params, stats, images, train=train)
            chosen = jax.nn.log_softmax(output.logits)[jnp.arange(BATCH), labels]
            return -jnp.mean(chosen), (output, after)

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient)(spread, images)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, forward_and_gradients("every"), forward_and_gradients("blocks"))


def test_training_mode_does_not_hang_on_the_block_size(routed, apply, images, spread):
    _, _, stats = routed
    other = jax.jit(partial(network(block_size=4)[0].apply, train=True))(spread, stats, images)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        other,
        apply(spread, stats, images, train=True),
    )


def test_route_agrees_with_apply(routed, apply, images, spread):
    net, _, stats = routed
    for train in (False, True):
        routing, after = jax.jit(partial(net.route, train=train))(spread, stats, images)
        output, all_after = apply(spread, stats, images, train=train)
        np.testing.assert_allclose(routing.scores, output.routing.scores, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(routing.indices, output.routing.indices)
        np.testing.assert_array_equal(routing.weights, 1.0)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            after["router"],
            all_after["router"],
        )
        assert all(equal(after["experts"], stats["experts"]))


def test_images_are_normalised_first(routed, apply, images):
    _, params, stats = routed
    raw = Model(
        Normalize((0.0,), (1.0,)),
        *(lambda m: (m.backbone, m.router))(nnx.eval_shape(build)),
        num_experts=EXPERTS,
        block_size=2,
    )
    net = functional(raw)[0]
    expected = jax.jit(net.apply)(params, stats, (images - 0.4) / 0.3)[0].logits
    np.testing.assert_allclose(
        apply(params, stats, images)[0].logits, expected, rtol=1e-4, atol=1e-5
    )


def test_all_experts_under_the_softmax_gate_are_a_mixture(images):
    net, params, stats = network(backbone=OneLayer, top_k=EXPERTS, gate="softmax")
    apply = jax.jit(net.apply)
    output, _ = apply(params, stats, images)
    assert output.routing.indices.shape == (BATCH, 1, EXPERTS)
    probabilities = jax.nn.softmax(output.routing.scores[:, 0])
    pathways = [apply(params, stats, images, routing=force(e))[0].logits for e in range(EXPERTS)]
    mixture = sum(p[:, None] * logits for p, logits in zip(probabilities.T, pathways, strict=True))
    np.testing.assert_allclose(output.logits, mixture, rtol=1e-5, atol=1e-6)


def test_softmax_gate_mixes_in_every_layer(images):
    """With one and the same kernel in every expert, the mixture of all is that expert."""
    net, params, stats = network(top_k=EXPERTS, gate="softmax")
    block = params["experts"]["block"]
    for conv in ("conv1", "conv2"):
        block[conv]["kernel"] = jnp.broadcast_to(
            block[conv]["kernel"][:1], block[conv]["kernel"].shape
        )
    apply = jax.jit(partial(net.apply, train=True))
    mixed, after = apply(params, stats, images)
    single, single_after = apply(params, stats, images, routing=force(0))
    np.testing.assert_allclose(mixed.logits, single.logits, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        after["experts"],
        single_after["experts"],
    )


def test_gradients_reach_every_parameter_and_leak_nothing(routed, images, spread):
    net, _, stats = routed

    def loss(params, images):
        output, after = net.apply(params, stats, images, train=True)
        return jnp.sum(output.logits**2), after

    def step(params, images):
        def inner(images):
            return loss(params, images)[0]

        moved = images + 0.01 * jax.grad(inner)(images)
        return jax.grad(loss, has_aux=True)(params, moved)

    grads, after = jax.jit(step)(spread, images)
    assert not any(equal(after, stats))
    # A bias or scale in front of a BatchNorm aside, everything has a gradient: the router's
    # arrives through the gate.
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.all(np.isfinite(gradient)) and np.any(gradient), path


def test_network_holds_no_arrays():
    model = nnx.eval_shape(lambda: build(2, backbone=OneLayer))
    net, params, stats = functional(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert {net: 1}[net] == 1
    assert jax.tree.leaves(params) and jax.tree.leaves(stats)


def test_networks_of_one_structure_are_equal():
    net, other = network(seed=0)[0], network(seed=1)[0]
    assert net == other and hash(net) == hash(other) and net is not other
    others = ({"num_experts": 2}, {"num_experts": 1}, {"top_k": 2}, {"gate": "softmax"},
              {"block_size": 3})  # fmt: skip
    assert all(net != network(**settings)[0] for settings in others)


@pytest.mark.parametrize(
    "settings", [{"block_size": -1}, {"strategy": "some"}, {"top_k": 4}, {"gate": "hard"}]
)
def test_wrong_settings(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        nnx.eval_shape(lambda: build(backbone=OneLayer, **settings))


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_a_routing_that_is_of_other_images_or_experts_is_refused(scope):
    values = {"num_experts": EXPERTS, "width": 4, "dispatch": "every", "image_shape": (8, 8, 1)}
    net, params, stats = by_name("resnet10_cifar", router={"scope": scope, "width": 4}, **values)
    images, decisions = jnp.zeros((5, 8, 8, 1)), len(net.decisions)

    def follow(indices, **more):
        return net.apply(params, stats, images, routing=Routing(indices), **more)

    right = jnp.zeros((5, decisions, 1), jnp.int32)
    assert follow(right)[0].logits.shape == (5, 10)
    for wrong in (right[:3], right[:1], jnp.zeros((5, decisions + 1, 1), jnp.int32)):
        with pytest.raises(UserError, match=r"5 images with . decisions each need"):
            follow(wrong)
    for number in (EXPERTS, -1):
        with pytest.raises(UserError, match=rf"names experts {number} to {number}; there are 0"):
            follow(right + number)
    with pytest.raises(UserError, match=r"noise is \(5, 2\); it must be \(5, "):
        net.apply(params, stats, images, noise=jnp.zeros((5, 2)))
