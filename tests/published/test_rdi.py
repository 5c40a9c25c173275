"""RDI-Nets' networks, written in PyTorch here, against ours: logits of every exit, files back."""

import os
import subprocess
import sys
from functools import partial

import flax.nnx as nnx
import jax
import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN
from advmoe_jax.models.network import functional
from advmoe_jax.models.trunk import NEVER, thresholds_of
from advmoe_jax.published import rdi, torch_names
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint, arrays_of, read, write
from advmoe_jax.published.torch_model import network_of

torch = pytest.importorskip("torch")
nn = torch.nn
conv = partial(nn.Conv2d, bias=False)


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(*projection)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class Exiting(nn.Module):
    """Blocks and heads; the answers of all exits."""

    def __init__(self, heads):
        super().__init__()
        for i, head in enumerate(heads, 1):
            setattr(self, f"branch_layer{i}", nn.Sequential(*head))

    def forward(self, x):
        answers, x = [], self.begin(x)
        for number, block in enumerate(self.blocks(), 1):
            x = block(x)
            if number in self.places:
                answers.append(getattr(self, f"branch_layer{len(answers) + 1}")(x))
        return [*answers, self.end(x)]


class ResNet38(Exiting):
    places = rdi.NETWORKS["resnet38_cifar"].exits

    def __init__(self):
        def heavy():
            first = nn.MaxPool2d(2), conv(16, 64, 5, 1, 2), nn.BatchNorm2d(64), nn.ReLU()
            second = nn.MaxPool2d(2), conv(64, 32, 3, 1, 1), nn.BatchNorm2d(32)
            return [*first, *second, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(32, 10)]

        def middle():
            return [
                nn.MaxPool2d(2),
                Basic(32, 32),
                nn.AvgPool2d(8),
                nn.Flatten(),
                nn.Linear(32, 10),
            ]

        light = lambda: [nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10)]  # noqa: E731
        super().__init__([heavy(), heavy(), middle(), middle(), light(), light()])
        self.conv1, self.bn1 = conv(3, 16, 3, 1, 1), nn.BatchNorm2d(16)
        inputs = 16
        for group, width in enumerate((16, 32, 64)):
            for i in range(6):
                block = Basic(inputs, width, 2 if group and not i else 1)
                setattr(self, f"group{group}_layer{i}", block)
                inputs = width
        self.fc = nn.Linear(64, 10)

    def begin(self, x):
        return torch.relu(self.bn1(self.conv1(x)))

    def blocks(self):
        return [getattr(self, f"group{g}_layer{i}") for g in range(3) for i in range(6)]

    def end(self, x):
        return self.fc(x.mean((2, 3)))


class Small(Exiting):
    places = rdi.NETWORKS["small_cnn"].exits

    def __init__(self):
        def linears(n):
            return [nn.Linear(n, 200), nn.Dropout(), nn.Linear(200, 200), nn.Linear(200, 10)]

        first = [nn.Conv2d(32, 16, 3, 2), nn.MaxPool2d(2), nn.Flatten(), *linears(576)]
        super().__init__([first, [nn.MaxPool2d(2), nn.Flatten(), *linears(1600)]])
        for i, (a, b) in enumerate(((1, 32), (32, 32), (32, 64), (64, 64)), 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, 3))
        self.fc1, self.fc2, self.fc3 = nn.Linear(1024, 200), nn.Linear(200, 200), nn.Linear(200, 10)

    def begin(self, x):
        return x

    def blocks(self):
        pool = nn.MaxPool2d(2)
        return [
            lambda x: torch.relu(self.conv1(x)),
            lambda x: pool(torch.relu(self.conv2(x))),
            lambda x: torch.relu(self.conv3(x)),
            lambda x: pool(torch.relu(self.conv4(x))),
        ]

    def end(self, x):
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1))))))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        wide = expansion * inputs
        self.conv1, self.bn1 = conv(inputs, wide, 1), nn.BatchNorm2d(wide)
        self.conv2 = conv(wide, wide, 3, stride, 1, groups=wide)
        self.bn2, self.conv3 = nn.BatchNorm2d(wide), conv(wide, outputs, 1)
        self.bn3, self.shortcut, self.stride = nn.BatchNorm2d(outputs), nn.Sequential(), stride
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.stride == 1 else y


class Mobile(Exiting):
    places = rdi.NETWORKS["mobilenet_v2"].exits

    def __init__(self):
        two = [
            *(Inverted(16, 32, 6, 2), nn.BatchNorm2d(32), nn.ReLU()),
            *(Inverted(32, 64, 6, 2), nn.BatchNorm2d(64)),
        ]
        mean = lambda n, size: [nn.AvgPool2d(size), nn.Flatten(), nn.Linear(n, 10)]  # noqa: E731
        heads = [[*two, *mean(64, 8)], [Inverted(32, 32, 6, 2), *mean(32, 8)]]
        super().__init__([*heads, mean(64, 8), mean(64, 8), mean(96, 8), mean(160, 4)])
        self.layer1, self.bn1, inputs, number = conv(3, 32, 3, 1, 1), nn.BatchNorm2d(32), 32, 2
        table = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
        for expansion, width, count, stride in (*table, (6, 160, 3, 2), (6, 320, 1, 1)):
            for i in range(count):
                block = Inverted(inputs, width, expansion, stride if i == 0 else 1)
                setattr(self, f"layer{number}", block)
                inputs, number = width, number + 1
        self.layer19, self.conv2 = conv(320, 1280, 1), conv(320, 1280, 1)
        self.bn2, self.linear = nn.BatchNorm2d(1280), nn.Linear(1280, 10)

    def begin(self, x):
        return torch.relu(self.bn1(self.layer1(x)))

    def blocks(self):
        return [getattr(self, f"layer{number}") for number in range(2, 19)]

    def end(self, x):
        return self.linear(torch.relu(self.bn2(self.layer19(x))).mean((2, 3)))


NETWORKS = {"resnet38_cifar": ResNet38, "small_cnn": Small, "mobilenet_v2": Mobile}
KEYS = {"resnet38_cifar": 296, "small_cnn": 28, "mobilenet_v2": 421}


def random_network(name):
    """Random weights, random statistics."""
    torch.manual_seed(0)
    theirs = NETWORKS[name]().eval()
    for key, value in theirs.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.3)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    if name == "small_cnn":
        nn.init.normal_(theirs.fc3.weight, 0, 0.1)
    return theirs


def saved(path, theirs, legacy=True):
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    content = {"arch": "theirs", "iter": 12, "best_prec1": 0.0, "state_dict": state}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize(
    "name", ["small_cnn", "resnet38_cifar", pytest.param("mobilenet_v2", marks=pytest.mark.slow)]
)
def test_every_exits_logits_are_pytorchs_and_the_file_goes_back(tmp_path, name):
    theirs = random_network(name)
    state = theirs.state_dict()
    assert len(state) == KEYS[name]
    saved(tmp_path / "theirs.pth.tar", theirs)
    checkpoint = read(tmp_path / "theirs.pth.tar")
    assert checkpoint.epoch == 12
    cnn = network_of(checkpoint, name=name, num_experts=1)
    assert cnn.exits == NETWORKS[name].places and cnn.mean == (0.0,)
    params, stats = arrays_of(cnn, checkpoint)
    np.testing.assert_array_equal(thresholds_of(stats), NEVER)
    channels, size = (1, 28) if name == "small_cnn" else (3, 32)
    network, *_ = functional(
        nnx.eval_shape(lambda: cnn.create(in_channels=channels, num_classes=10, rngs=nnx.Rngs(0)))
    )
    images = np.random.default_rng(0).uniform(size=(2, size, size, channels)).astype(np.float32)
    ours = jax.jit(network.apply)(params, stats, images)[0].exits
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    for logits, right in zip(ours, expected, strict=True):
        scale = max(1.0, float(right.abs().max()))
        np.testing.assert_allclose(logits / scale, right.numpy() / scale, atol=1e-4)
    # Out again, under the names that their code loads.
    tensors = torch_names.to_torch(name, params, stats)
    path = tmp_path / "ours.pth.tar"
    write(path, TorchCheckpoint(tensors, arch=rdi.NETWORKS[name].arch, epoch=12))
    again = torch.load(path, weights_only=True)
    assert set(again) == {"arch", "iter", "best_prec1", "state_dict"}
    back = {key.removeprefix("module."): value for key, value in again["state_dict"].items()}
    assert set(back) == set(state)
    for key, value in back.items():
        if key != "conv2.weight" or name != "mobilenet_v2":
            assert torch.equal(value, state[key]), key


def test_a_file_of_another_network_is_told_in_one_line(tmp_path):
    saved(tmp_path / "small.pth.tar", random_network("small_cnn"))
    checkpoint = read(tmp_path / "small.pth.tar")
    cnn = network_of(checkpoint, name="resnet38_cifar", num_experts=1)
    with pytest.raises(UserError, match=r"bn1\.bias is missing; .* more$") as told:
        arrays_of(cnn, checkpoint)
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_command_ends_with_exit_code_2(tmp_path):
    saved(tmp_path / "small.pth.tar", random_network("small_cnn"))
    command = [sys.executable, "-m", "advmoe_jax.import_torch", "--model=resnet38_cifar"]
    command += [f"--checkpoint={tmp_path}/small.pth.tar", f"--workdir={tmp_path}/run"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1 and "does not fit" in run.stderr


def test_the_old_format_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "hostile.pth.tar"
    content = {"state_dict": {"x": torch.zeros(1)}, "more": Hostile()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="asks to run"):
        read(path)
    assert not (tmp_path / "made").exists()


def test_a_network_without_exits_is_recognised():
    checkpoint = TorchCheckpoint({"conv1.weight": np.zeros((16, 3, 3, 3), np.float32)})
    assert network_of(checkpoint, name="resnet38_cifar", num_experts=2) == CNN(
        "resnet38_cifar", mean=(0.0,), std=(1.0,)
    )
