"""What network a published checkpoint is of: the router's size, the normalisation, the widening."""

import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint
from advmoe_jax.published.torch_model import network_of

ROUTER = {
    f"router.{name}.weight": np.zeros((4, 3, 3, 3), np.float32)
    for name in ("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1")
}
FILE = TorchCheckpoint(ROUTER, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def described(checkpoint=FILE, name="resnet18_cifar", num_experts=2, **settings):
    return network_of(checkpoint, name=name, num_experts=num_experts, **settings)


def test_a_mixture_has_the_file_s_router_and_normalisation():
    model = described()
    assert (model.name, model.num_experts, model.ratio, model.top_k) == (
        "resnet18_cifar",
        2,
        0.5,
        1,
    )
    router = model.router
    assert (router.width, router.blocks, router.scope) == (4, 2, "global")
    assert (tuple(model.mean), tuple(model.std)) == (FILE.mean, FILE.std)
    assert described(ratio=0.25, width=8).ratio == 0.25


def test_a_dense_network_needs_no_router():
    model = described(TorchCheckpoint({}), num_experts=1)
    assert model.ratio == 1.0 and tuple(model.mean) == (0.0,) and tuple(model.std) == (1.0,)
    with pytest.raises(UserError, match="holds no router: give --num_experts=1"):
        described(TorchCheckpoint({}))


def test_the_normalisation_that_the_published_code_never_calls_is_left_out():
    assert tuple(described(name="vgg16_bn").mean) == (0.0,)
    assert tuple(described(name="vgg16_bn", normalize="file").mean) == FILE.mean
    assert tuple(described(normalize="none").mean) == (0.0,)
    with pytest.raises(UserError, match="holds no normalisation"):
        described(TorchCheckpoint(ROUTER), normalize="file")


@pytest.mark.parametrize(
    ("name", "num_experts", "expected"),
    [
        ("wrn_28_10_cifar", 1, False),
        ("wrn_28_10_cifar", 2, True),
        ("wrn_28_10_imagenet", 1, True),
        ("resnet18_cifar", 2, False),
    ],
)
def test_wide_resnets_widen_as_published(name, num_experts, expected):
    assert described(name=name, num_experts=num_experts).raw_widening == expected
    other = described(name=name, num_experts=num_experts, raw_widening=not expected)
    assert other.raw_widening != expected
