"""Networks by name, without a config."""

import jax
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models import BACKBONES, CNN, SIZES, model
from advmoe_jax.models.registry import create

SMALL = {"width": 4, "router": {"width": 4, "blocks": 1}, "image_shape": (8, 8, 1)}


def test_a_mixture_by_name_is_the_records_network():
    network, params, stats = model("resnet10_cifar", num_experts=2, ratio=0.5, seed=3, **SMALL)
    record = CNN("resnet10_cifar", num_experts=2, ratio=0.5, width=4)
    record = record._replace(router=record.router._replace(width=4, blocks=1))
    expected = create(record, (8, 8, 1), 10, jax.random.key(3))
    assert network == expected[0] and network.parts == ("experts", "router")
    jax.tree.map(np.testing.assert_array_equal, (params, stats), expected[1:])


def test_a_transformer_by_name():
    network, params, _ = model("vit_tiny_8", num_experts=2, image_shape=(8, 8, 1), num_classes=3)
    assert network.is_moe and len(network.decisions) > 1
    assert params["experts"]["head"]["kernel"].shape[-1] == 3


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("resnet18", {}, "model 'resnet18' is unknown; did you mean 'resnet18_"),
        ("resnet18_cifar", {"experts": 2}, "experts does not exist; did you mean num_experts?"),
        ("resnet18_cifar", {"router": {"widht": 2}}, "router.widht does not exist; did you mean "),
        ("resnet18_cifar", {"router": 3}, "router is a group: give a dict of scope, resolution"),
        ("resnet18_cifar", {"image_shape": (8, 8)}, "must be .height, width, channels."),
        ("resnet18_cifar", {"ratio": 2.0}, "model.ratio=2.0 must lie in"),
        ("resnet18_cifar", {"mean": 0.5}, r"^mean=0.5 must be a tuple$"),
        ("resnet18_cifar", {"num_experts": "2"}, r"^num_experts='2' must be a int$"),
        ("resnet18_cifar", {"num_experts": 2.0}, r"^num_experts=2.0 must be a int$"),
        ("resnet18_cifar", {"ratio": True}, r"^ratio=True must be a float$"),
        ("resnet18_cifar", {"router": {"width": None}}, r"^router.width=None must be a int$"),
        ("vit_tiny_8", {}, "8"),
    ],
)
def test_what_is_no_network_is_refused(name, values, told):
    with pytest.raises(UserError, match=told):
        model(name, **values)


def test_names_of_families_are_apart():
    assert not BACKBONES.keys() & SIZES.keys()
