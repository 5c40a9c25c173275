"""Routers in front of every MoE layer: what they see, what is followed, what trains them."""

from functools import partial

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.layers import Context, conv2d
from advmoe_jax.models.moe import MoEConv, number_layers
from advmoe_jax.models.router import LayerRouter
from advmoe_jax.routing.choice import Routing

BATCH, EXPERTS, LAYERS = 9, 3, 2


def build(tiny, **settings):
    """A network whose routers have seen images, and spread them over the experts."""
    network, params, stats = tiny(EXPERTS, scope="per_layer", **settings)
    images = jax.random.uniform(jax.random.key(0), (BATCH, 8, 8, 1))
    see = jax.jit(partial(network.route, train=True))
    for _ in range(60):
        stats = see(params, stats, images)[1]
    return network, params, stats, images


@pytest.fixture(scope="module")
def setting(tiny):
    return build(tiny)


def by_hand(params, stats, images, gate, top_k):
    """Every expert of every layer, mixed per image: (logits, indices, scores)."""
    p, s, routers = params["experts"], stats["experts"], params["router"]

    def norm(x, name, p=p, s=s):
        scale = p[name]["scale"] / jnp.sqrt(s[name]["var"] + 1e-5)
        return (x - s[name]["mean"]) * scale + p[name]["bias"]

    def mixture(x, name, stride):
        r, mean = routers[name], jnp.mean(x, (1, 2))
        pooled = norm(mean, "bn", r, stats["router"][name])
        hidden = jax.nn.relu(pooled @ r["hidden"]["kernel"] + r["hidden"]["bias"])
        scores = hidden @ r["head"]["kernel"] + r["head"]["bias"]
        indices = jnp.argsort(-scores, axis=-1)[:, :top_k]
        weights = jax.nn.softmax(scores) if gate == "softmax" else jnp.ones_like(scores)
        chosen = jnp.sum(jax.nn.one_hot(indices, EXPERTS), axis=1)
        every = jnp.stack([conv2d(x, kernel, stride, 1) for kernel in p[name]["kernel"]], axis=1)
        return jnp.einsum("bn,bnhwc->bhwc", weights * chosen, every), indices, scores

    x = jax.nn.relu(norm(conv2d((images - 0.5) / 0.25, p["stem"]["kernel"], 1, 1), "bn1"))
    x, first, first_scores = mixture(x, "conv", 2)
    x, second, second_scores = mixture(jax.nn.relu(norm(x, "bn2")), "more0", 1)
    logits = jnp.mean(jax.nn.relu(x), (1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]
    return logits, jnp.stack([first, second], 1), jnp.stack([first_scores, second_scores], 1)


@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_every_layer_mixes_what_its_router_chooses(tiny, gate, top_k):
    network, params, stats, images = build(tiny, gate=gate, top_k=top_k)
    output, after = jax.jit(network.apply)(params, stats, images)
    logits, indices, scores = jax.jit(by_hand, static_argnums=(3, 4))(
        params, stats, images, gate, top_k
    )
    assert output.routing.indices.shape == (BATCH, LAYERS, top_k)
    np.testing.assert_array_equal(output.routing.indices, indices)
    np.testing.assert_allclose(output.routing.scores, scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, stats)
    # The layers and the images differ in their routes, or this would show little.
    assert len(np.unique(indices[:, 0, 0])) > 1 and np.any(indices[:, 0] != indices[:, 1])


def test_a_forced_route_is_followed_layer_by_layer(setting):
    network, params, stats, images = setting
    apply = jax.jit(network.apply)
    free = apply(params, stats, images)[0]
    frozen = apply(params, stats, images, routing=free.routing)[0]
    np.testing.assert_array_equal(frozen.logits, free.logits)
    other = free.routing._replace(indices=(free.routing.indices + jnp.array([[0], [1]])) % EXPERTS)
    moved = apply(params, stats, images, routing=other)[0]
    assert np.abs(moved.logits - free.logits).max(axis=1).min() > 1e-5
    # The routers play no part.
    blind = params | {"router": jax.tree.map(jnp.zeros_like, params["router"])}
    np.testing.assert_array_equal(
        apply(blind, stats, images, routing=other)[0].logits, moved.logits
    )


def test_route_is_what_apply_follows(setting):
    network, params, stats, images = setting
    routing, after = jax.jit(network.route)(params, stats, images)
    jax.tree.map(
        np.testing.assert_array_equal, routing, jax.jit(network.apply)(params, stats, images)[0][1]
    )
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_routers_train_while_the_backbone_keeps_its_statistics(setting):
    network, params, stats, images = setting
    output, after = network.apply(params, stats, images, train_router=True)
    jax.tree.map(np.testing.assert_array_equal, after["experts"], stats["experts"])
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), after["router"], stats["router"])
    assert all(jax.tree.leaves(changed))
    assert output.routing.scores.shape == (BATCH, LAYERS, EXPERTS)


@pytest.mark.parametrize("train_router", [False, True])
def test_the_gate_has_its_surrogate_gradient_in_training_only(setting, train_router):
    network, params, stats, images = setting

    def loss(router):
        changed = params | {"router": router}
        return jnp.sum(network.apply(changed, stats, images, train_router=train_router)[0].logits)

    gradients = jax.jit(jax.grad(loss))(params["router"])
    for name in ("conv", "more0"):
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients[name]))
        assert (largest > 1e-4) if train_router else (largest == 0)


def test_to_an_attacker_the_route_is_constant(setting):
    network, params, stats, images = setting
    routing = network.route(params, stats, images)[0]
    constant = Routing(routing.indices, jnp.ones_like(routing.weights), routing.scores)

    def gradient(routing):
        return jax.jit(
            jax.grad(
                lambda x: jnp.sum(network.apply(params, stats, x, routing=routing)[0].logits[:, 0])
            )
        )(images)

    np.testing.assert_array_equal(gradient(None), gradient(constant))


def test_layers_are_numbered_in_the_order_of_execution():
    wide = CNN("wrn_34_10_cifar", num_experts=2, ratio=0.5, width=4)
    model = nnx.eval_shape(lambda: wide.create(in_channels=3, num_classes=10, rngs=nnx.Rngs(0)))
    names = list(number_layers(model.backbone))
    assert names[:4] == ["layer1_0_conv1", "layer1_0_conv2", "layer1_0_shortcut", "layer1_1_conv1"]
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, MoEConv)]
    assert sorted(layer.number for layer in layers) == list(range(len(names)))


def test_a_layer_router_sees_means_and_speaks_float32():
    router = LayerRouter(6, 4, width=8, rngs=nnx.Rngs(0))
    router.head.kernel[...] += 1.0
    router.hidden.bias[...] += 1.0
    x = jax.random.uniform(jax.random.key(0), (5, 7, 3, 6), jnp.bfloat16)
    scores = router(x, Context())
    assert scores.dtype == jnp.float32 and scores.shape == (5, 4)
    shuffled = router(x[:, ::-1], Context())
    np.testing.assert_allclose(scores, shuffled, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet10_cifar", "vgg11_bn", "densenet_cifar", "wrn_28_4_cifar"])
def test_every_family_can_be_routed_per_layer(name):
    router = RouterSettings(scope="per_layer", width=4)
    settings = CNN(name, num_experts=2, ratio=0.5, width=8, router=router)
    model = nnx.eval_shape(lambda: settings.create(in_channels=3, num_classes=7, rngs=nnx.Rngs(0)))
    assert len(model.router.names) == len(number_layers(model.backbone)) >= 7
    assert model.decisions == model.router.names
