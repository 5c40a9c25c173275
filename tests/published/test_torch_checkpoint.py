"""Files of the published code: there and back in the same bits, and what is refused."""

import os
import pickle
import zipfile

import flax.nnx as nnx
import jax
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.network import functional
from advmoe_jax.published import torch_names
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint, arrays_of, read, write

torch = pytest.importorskip("torch")

NETWORKS = [
    ("resnet18_cifar", 2),
    ("resnet50_imagenet", 2),
    ("wrn_28_4_imagenet", 2),
    ("vgg16_bn", 3),
    ("vgg11", 1),
    ("densenet_imagenet", 2),
]


def build(name, experts):
    """(network, params, stats) of random values."""
    router = RouterSettings(width=4, blocks=2)
    network = CNN(name, num_experts=experts, ratio=0.5, width=8, router=router)
    model = nnx.eval_shape(lambda: network.create(in_channels=3, num_classes=7, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    _, params, stats = functional(model)
    draw = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), (params, stats))
    return network, *draw


def same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(("name", "experts"), NETWORKS)
def test_out_and_in_again(tmp_path, name, experts):
    network, params, stats = build(name, experts)
    path = tmp_path / "model.pth.tar"
    tensors = torch_names.to_torch(name, params, stats)
    write(path, TorchCheckpoint(tensors, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), name, 12))
    found = read(path)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.arch, found.epoch) == (name, 12)
    same_bits(arrays_of(network, found), (params, stats))
    # And in, and out again.
    assert tensors.keys() == found.tensors.keys()
    same_bits(tensors, found.tensors)
    content = torch.load(path, weights_only=True)
    assert {"state_dict", "epoch", "best_acc", "sa_record", "optimizer"} <= set(content)
    assert ("router" in content) == (experts > 1)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth.tar"]


def test_experts_are_stacked_along_the_output_channels():
    network, params, stats = build("resnet18_cifar", 2)
    theirs = torch_names.to_torch(network.name, params, stats)["layer2.0.conv1.weight"]
    kernel = params["experts"]["layer2_0"]["conv1"]["kernel"]
    width = kernel.shape[-1]
    for expert in range(2):
        rows = theirs[expert * width : (expert + 1) * width]
        np.testing.assert_array_equal(rows.transpose(2, 3, 1, 0), kernel[expert])


@pytest.fixture(scope="module")
def small():
    network, params, stats = build("vgg11", 2)
    return network, torch_names.to_torch("vgg11", params, stats)


def save(path, **content):
    torch.save(content, path)
    return path


def as_torch(tensors):
    return {name: torch.from_numpy(x.copy()) for name, x in tensors.items()}


def refusal(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_data_parallel_prefix_and_missing_extras_are_no_matter(tmp_path, small):
    network, tensors = small
    state = {f"module.{name}": x for name, x in as_torch(tensors).items()}
    found = read(save(tmp_path / "x.pth.tar", state_dict=state))
    assert found.epoch == 0 and found.mean is None
    same_bits(arrays_of(network, found), arrays_of(network, TorchCheckpoint(tensors)))


def test_every_problem_is_named(small):
    network, tensors = small
    changed = dict(tensors)
    del changed["classifier.0.bias"]
    changed["classifier.9.bias"] = np.zeros(3, np.float32)
    changed["classifier.4.weight"] = np.zeros((7, 3), np.float32)
    message = refusal(arrays_of, network, TorchCheckpoint(changed))
    assert "classifier.0.bias is missing" in message
    assert "classifier.9.bias is left over" in message
    assert "classifier.4.weight is [7, 3], not [7, 256]" in message


def test_a_checkpoint_of_another_network(small):
    network, tensors = small
    for changes in ({"num_experts": 3}, {"ratio": 1.0}, {"name": "vgg13"}):
        message = refusal(arrays_of, network._replace(**changes), TorchCheckpoint(tensors))
        assert " is [" in message or " is missing" in message


def test_two_different_routers_are_refused(tmp_path, small):
    _, tensors = small
    router = {k.removeprefix("router."): v for k, v in as_torch(tensors).items() if "router." in k}
    router = {k: v + 1.0 for k, v in router.items() if "router" not in k and v.is_floating_point()}
    path = save(tmp_path / "x.pth.tar", state_dict=as_torch(tensors), router=router)
    assert "two routers" in refusal(read, path)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_run(tmp_path, small):
    _, tensors = small
    mark = tmp_path / "mark"
    evil = Malicious(f"touch {mark}")
    path = save(tmp_path / "x.pth.tar", state_dict=as_torch(tensors), best_acc=evil)
    message = refusal(read, path)
    assert "asks to run" in message and "refused" in message
    (tmp_path / "y.pth.tar").write_bytes(pickle.dumps(evil))
    refusal(read, tmp_path / "y.pth.tar")
    assert not mark.exists()


def test_files_that_are_no_checkpoint(tmp_path, small):
    _, tensors = small
    whole = save(tmp_path / "whole.pth.tar", state_dict=as_torch(tensors)).read_bytes()
    cut = tmp_path / "cut.pth.tar"
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        assert str(cut) in refusal(read, cut)
    assert "directory" in refusal(read, tmp_path)
    assert "cannot be read" in refusal(read, tmp_path / "none.pth.tar")
    assert "no state_dict" in refusal(read, save(tmp_path / "a.pth.tar", weights=1))
    assert "no tensor" in refusal(read, save(tmp_path / "b.pth.tar", state_dict={"a": 1}))
    bomb = tmp_path / "bomb.pth.tar"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10**7)
    assert "declares more bytes" in refusal(read, bomb)
    # Few bytes that look like many, by strides of zero.
    wide = torch.zeros(1).expand(10**9)
    assert "declares more values" in refusal(
        read, save(tmp_path / "c.pth.tar", state_dict={"a": wide})
    )


def test_damage_that_pytorch_does_not_see(tmp_path, small):
    _, tensors = small
    path = save(tmp_path / "x.pth.tar", state_dict=as_torch(tensors))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    assert f"is damaged ({largest.filename})" in refusal(read, path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, small, value):
    changed = as_torch(small[1])
    changed["classifier.0.bias"][3] = value
    path = save(tmp_path / "x.pth.tar", state_dict=changed)
    assert "'classifier.0.bias' has values that are not finite" in refusal(read, path)


def test_an_existing_file_is_not_overwritten(tmp_path, small):
    _, tensors = small
    path = tmp_path / "x.pth.tar"
    path.write_bytes(b"precious")
    assert "exists already" in refusal(write, path, TorchCheckpoint(tensors))
    assert path.read_bytes() == b"precious"


def test_without_torch_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert "pip install" in refusal(read, tmp_path / "x.pth.tar")
