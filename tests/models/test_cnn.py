"""CNNs by name: what can be built, and what is said when it cannot."""

import flax.nnx as nnx
import jax.numpy as jnp
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.moe import MoEConv


def config(**changes):
    of_router = {k.split(".")[1]: v for k, v in changes.items() if k.startswith("router.")}
    router = RouterSettings(**{"width": 4, "blocks": 1, **of_router})
    own = {k: v for k, v in changes.items() if not k.startswith("router.")}
    return CNN(**{"num_experts": 2, "ratio": 0.5, "width": 8, "router": router, **own})


def create(**changes):
    return nnx.eval_shape(
        lambda: config(**changes).create(in_channels=3, num_classes=10, rngs=nnx.Rngs(0))
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet19_cifar"}, ["'resnet19_cifar'", "did you mean 'resnet", "resnet152_"]),
        ({"name": "resnet34"}, ["'resnet34'", "did you mean 'resnet34_cifar'"]),
        ({"name": "zzz"}, ["'zzz'", "valid names: ", "resnet18_cifar"]),
        ({"num_experts": 0}, ["model.num_experts=0"]),
        ({"width": -1}, ["model.width=-1"]),
        ({"keep": 0.0}, ["model.keep=0.0"]),
        ({"keep": 1.5}, ["model.keep=1.5"]),
        ({"keep": 0.5}, ["model.keep=0.5", "model.num_experts=1"]),
        ({"router.width": 0}, ["model.router.width=0"]),
        ({"router.blocks": 0}, ["model.router.blocks=0"]),
        ({"router.scope": "layer"}, ["model.router.scope='layer'", "global, per_layer"]),
        ({"router.resolution": -1}, ["model.router.resolution=-1"]),
        ({"ratio": 0}, ["model.ratio=0"]),
        ({"ratio": 2}, ["model.ratio=2"]),
        ({"ratio": 0.1}, ["model.ratio=0.1", "model.width=8"]),
        ({"mean": (0.5, 0.5)}, ["model.mean", "2 values", "3 channels"]),
        ({"std": (0.5, 0.5)}, ["model.std", "2 values", "3 channels"]),
        ({"std": (0.0,)}, ["model.std=(0.0,)", "positive"]),
        ({"dtype": "float16"}, ["model.dtype='float16'", "bfloat16"]),
        ({"param_dtype": "float16"}, ["model.param_dtype='float16'"]),
        ({"block_size": -1}, ["model.block_size=-1"]),
        ({"dispatch": "some"}, ["model.dispatch='some'", "auto, blocks, every"]),
        ({"top_k": 3}, ["model.top_k=3", "num_experts=2"]),
        ({"top_k": 0}, ["model.top_k=0"]),
        ({"gate": "hard"}, ["model.gate='hard'", "softmax"]),
    ],
)
def test_a_wrong_value_is_named(changes, words):
    with pytest.raises(UserError) as error:
        create(**changes)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["resnet101_cifar", "resnet152_imagenet"])
def test_the_deepest_build(name):
    model = create(name=name)
    assert model.num_experts == 2 and model.router is not None
    assert model.backbone.head.bias.shape == (10,)


def test_settings_arrive():
    model = create(
        num_experts=3,
        top_k=2,
        gate="softmax",
        block_size=4,
        dtype="bfloat16",
        param_dtype="bfloat16",
        mean=(0.1, 0.2, 0.3),
        router=RouterSettings("global", 4, 6, 2),
    )
    assert (model.num_experts, model.top_k, model.gate, model.block_size) == (3, 2, "softmax", 4)
    assert model.normalize.mean == (0.1, 0.2, 0.3) and model.normalize.std == (0.25,)
    conv = model.backbone.layer1_0.conv1
    assert isinstance(conv, MoEConv) and conv.kernel.shape == (3, 3, 3, 8, 4)
    assert conv.dtype == jnp.bfloat16 and conv.kernel.dtype == jnp.bfloat16
    assert model.router.stem.kernel.shape == (3, 3, 3, 6)
    assert len(model.router.names) == 6 and model.router.resolution == 4


def test_one_expert_is_dense():
    model = create(num_experts=1)
    assert model.router is None
    assert not any(isinstance(node, MoEConv) for _, node in nnx.iter_graph(model))
