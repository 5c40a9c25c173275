"""Our networks against PyTorch, number by number: logits, gradients, running statistics.

The PyTorch networks are plain ones, in the published code's names, written independently of our
JAX code: all experts are computed and mixed by the gate's weights. They come to us as a user's do,
through a file.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.network import functional
from advmoe_jax.published import torch_checkpoint, torch_names
from advmoe_jax.routing.choice import choose

torch = pytest.importorskip("torch")
F, nn = torch.nn.functional, torch.nn
torch.set_num_threads(1)  # more of them wait for each other where cores are shared

MEAN, STD = (0.4, 0.5, 0.45), (0.25, 0.2, 0.3)
CLASSES = 10
# Of the logits whose sum is differentiated: others for each image, since BatchNorm in training mode
# takes away what all images of a batch have in common.
WEIGHTS = np.random.default_rng(0).normal(size=(32, CLASSES)).astype(np.float32)


RESNETS = {18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3))}


class Experts(nn.Conv2d):
    """N kernels stacked along the output channels; ``mix`` [B, N] weighs their outputs."""

    def __init__(self, inputs, outputs, *args, experts, **settings):
        super().__init__(inputs, outputs * experts, *args, bias=False, **settings)
        self.experts, self.mix = experts, None

    def forward(self, x):
        every = super().forward(x).unflatten(1, (self.experts, -1))
        return torch.einsum("bn,bnchw->bchw", self.mix, every)


def conv(inputs, outputs, size, stride=1, experts=1):
    settings = {"stride": stride, "padding": size // 2}
    if experts > 1:
        return Experts(inputs, outputs, size, experts=experts, **settings)
    return nn.Conv2d(inputs, outputs, size, bias=False, **settings)


class Residual(nn.Module):
    def __init__(self, inputs, planes, stride, bottleneck, imagenet, experts):
        super().__init__()
        self.depth, outputs = (3, planes * 4) if bottleneck else (2, planes)
        sizes, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        widths = [inputs, *[planes] * (self.depth - 1), outputs]
        for i in range(self.depth):
            layer = conv(widths[i], widths[i + 1], sizes[i], strides[i], experts)
            self.add_module(f"conv{i + 1}", layer)
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.side = "downsample" if imagenet else "shortcut"
        if stride > 1 or inputs != outputs:
            layer = conv(inputs, outputs, 1, stride, experts if imagenet else 1)
            self.add_module(self.side, nn.Sequential(layer, nn.BatchNorm2d(outputs)))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(y + (self.get_submodule(self.side)(x) if hasattr(self, self.side) else x))


class ResNet(nn.Module):
    def __init__(self, depth, imagenet, width, ratio, experts, classes):
        super().__init__()
        bottleneck, blocks = RESNETS[depth]
        channels = int(width * ratio) if imagenet or experts == 1 else width
        self.conv1 = conv(3, channels, *((7, 2) if imagenet else (3, 1)))
        self.bn1, self.imagenet = nn.BatchNorm2d(channels), imagenet
        for stage, count in enumerate(blocks):
            planes, layers = int(width * 2**stage * ratio), []
            for i in range(count):
                stride = 2 if stage and not i else 1
                layers.append(Residual(channels, planes, stride, bottleneck, imagenet, experts))
                channels = planes * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.head = "fc" if imagenet else "linear"
        self.add_module(self.head, nn.Linear(channels, classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.get_submodule(self.head)(x.mean((2, 3)))


class Wide(nn.Module):
    def __init__(self, inputs, outputs, stride, raw, experts):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = conv(inputs, outputs, 3, stride, experts)
        self.conv2 = conv(outputs, outputs, 3, 1, experts)
        self.raw, self.widens = raw, inputs != outputs
        if self.widens:
            self.convShortcut = conv(inputs, outputs, 1, stride, experts)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        if self.widens:
            x = active = x if self.raw else active
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (self.convShortcut(x) if self.widens else x)


class WideResNet(nn.Module):
    def __init__(self, depth, factor, imagenet, raw, width, ratio, experts, classes):
        super().__init__()
        channels = int(width * ratio)
        self.conv1 = conv(3, channels, *((7, 2) if imagenet else (3, 1)))
        if imagenet:
            self.bn0 = nn.BatchNorm2d(channels)
        for stage in range(3):
            outputs, layers = int(width * factor * 2**stage * ratio), []
            for i in range((depth - 4) // 6):
                layers.append(Wide(channels, outputs, 2 if stage and not i else 1, raw, experts))
                channels = outputs
            block = nn.Module()
            block.layer = nn.Sequential(*layers)
            self.add_module(f"block{stage + 1}", block)
        self.bn1, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, classes)
        self.imagenet = imagenet

    def forward(self, x):
        x = self.conv1(x)
        x = F.max_pool2d(F.relu(self.bn0(x)), 3, 2, 1) if self.imagenet else x
        x = self.block3.layer(self.block2.layer(self.block1.layer(x)))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class VGG16(nn.Module):
    def __init__(self, batch_norm, width, ratio, experts, classes):
        super().__init__()
        layers, channels = [], 3
        for planes, count in zip((1, 2, 4, 8, 8), (2, 2, 3, 3, 3), strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                outputs = int(planes * width * ratio)
                layers.append(conv(channels, outputs, 3, 1, experts if layers else 1))
                layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
                layers.append(nn.ReLU())
                channels = outputs
        self.features = nn.Sequential(*layers)
        head = (nn.Linear(4 * channels, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.classifier = nn.Sequential(*head, nn.Linear(256, classes))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.features(x), (2, 2))
        return self.classifier(x.flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth, experts):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = conv(inputs, 4 * growth, 1, 1, experts)
        self.conv2 = conv(4 * growth, growth, 3, 1, experts)

    def forward(self, x):
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet40(nn.Module):
    def __init__(self, imagenet, width, ratio, experts, classes):
        super().__init__()
        channels, growth = int(width * ratio), int(width // 2 * ratio)
        self.features = nn.Sequential()
        self.features.add_module("conv0", conv(3, channels, *((7, 2) if imagenet else (3, 1))))
        if imagenet:
            self.features.add_module("norm0", nn.BatchNorm2d(channels))
            self.features.add_module("relu0", nn.ReLU())
            self.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
        for block in (1, 2, 3):
            layers = nn.Sequential()
            for i in range(6):
                layers.add_module(f"denselayer{i + 1}", DenseLayer(channels, growth, experts))
                channels += growth
            self.features.add_module(f"denseblock{block}", layers)
            if block < 3:
                transition = nn.Sequential()
                transition.add_module("norm", nn.BatchNorm2d(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", conv(channels, channels // 2, 1))
                transition.add_module("pool", nn.AvgPool2d(2))
                self.features.add_module(f"transition{block}", transition)
                channels //= 2
        self.features.add_module("norm_final", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class RouterBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.stride, self.extra = (1 if inputs == outputs else 2), outputs - inputs
        self.conv1, self.bn1 = conv(inputs, outputs, 3, self.stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.extra // 2
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(y + x)


class Router(nn.Module):
    def __init__(self, experts, width, blocks):
        super().__init__()
        self.conv1, self.bn1, channels = conv(3, width, 3), nn.BatchNorm2d(width), width
        for stage in range(3):
            outputs = width << stage
            layers = [RouterBlock(outputs if i else channels, outputs) for i in range(blocks)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            channels = outputs
        self.fc = nn.Linear(channels, experts)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Normalization(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x):
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


def randomise(network, generator):
    """Random parameters that keep activations of order one, and BatchNorm statistics off theirs.

    Most normalised values lie well above or well below zero: where rounding decides on which side
    of ReLU's kink a value lies, two correct implementations have different gradients.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.bias, 0, 0.1, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            for values, low, high in (
                (layer.weight, 0.3, 0.5),
                (layer.bias, 0.8, 1.2),
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(values, low, high, generator=generator)
            layer.bias.data[::3] *= -1


def attach(network, router):
    """Makes the router a child of the network and of every layer with experts, as published."""
    network.router = router
    for layer in network.modules():
        if isinstance(layer, Experts):
            layer.router = router


def classify(network, images, gate="straight_through"):
    """Logits of NCHW images in [0, 1], and the chosen experts (None when dense)."""
    x = network.normalize(images) if hasattr(network, "normalize") else images
    if not hasattr(network, "router"):
        return network(x), None
    scores = network.router(x)
    chosen = scores.argmax(1)
    mix = F.one_hot(chosen, scores.shape[1]).to(scores)
    if gate == "softmax":
        mix = mix * scores.softmax(1)
    elif network.training:
        mix = mix * (1 + scores - scores.detach())
    for layer in network.modules():
        if isinstance(layer, Experts):
            layer.mix = mix
    return network(x), chosen


# Name -> (width, size of the images, how to build it in PyTorch)
NETWORKS = {
    "resnet18_cifar": (8, 16, lambda *a: ResNet(18, False, *a)),
    "resnet50_cifar": (8, 16, lambda *a: ResNet(50, False, *a)),
    "resnet18_imagenet": (8, 32, lambda *a: ResNet(18, True, *a)),
    "resnet50_imagenet": (8, 32, lambda *a: ResNet(50, True, *a)),
    "wrn_28_10_cifar": (2, 16, lambda *a: WideResNet(28, 10, False, False, *a)),
    "wrn_28_10_imagenet": (2, 32, lambda *a: WideResNet(28, 10, True, True, *a)),
    "vgg16": (8, 16, lambda *a: VGG16(False, *a)),
    "vgg16_bn": (8, 32, lambda *a: VGG16(True, *a)),
    "densenet_cifar": (12, 16, lambda *a: DenseNet40(False, *a)),
    "densenet_imagenet": (12, 32, lambda *a: DenseNet40(True, *a)),
}
KINDS = {"dense": (1, 1.0), "s-dense": (1, 0.5), "moe": (2, 0.5)}
RAW = {"wrn_28_10_imagenet"}
CASES = [
    ("resnet18_cifar", "s-dense"),
    ("resnet18_cifar", "moe"),
    ("resnet50_imagenet", "dense"),
    ("wrn_28_10_cifar", "dense"),
    ("wrn_28_10_imagenet", "moe"),
    ("vgg16", "dense"),
    ("vgg16_bn", "moe"),
    ("densenet_cifar", "moe"),
    ("densenet_imagenet", "dense"),
]


def centre(router, images):
    """Has the router send about half of the images to each of two experts, in either mode."""
    for _ in range(50):
        difference = router(images).diff()
    # The boundary lies in the widest gap about the middle, so that no route hangs on rounding.
    middle = difference[:, 0].sort().values[8:24]
    gap = middle.diff().argmax()
    router.fc.bias[0] += middle[gap : gap + 2].mean()
    router.fc.weight *= 2 / difference.std()
    router.fc.bias *= 2 / difference.std()


def create(name, kind):
    """(PyTorch network, images float32 [32, H, W, 3]): seeded, logits of order one."""
    experts, ratio = KINDS[kind]
    width, size, build = NETWORKS[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    network = build(width, ratio, experts, CLASSES)
    network.normalize = Normalization(MEAN, STD)
    images = torch.rand(32, 3, size, size, generator=generator)
    # Of different brightness, so that a router of random weights has something to tell apart.
    images = images * torch.rand(32, 1, 1, 1, generator=generator)
    if experts > 1:
        attach(network, Router(experts, 4, 2))
    randomise(network, generator)
    with torch.no_grad():
        for _ in range(10):  # brings the random statistics near the batch's, but not to them
            classify(network.train(), images)
        if experts > 1:
            centre(network.router.train(), network.normalize(images))
        scale = [classify(network.train(mode), images)[0].std() for mode in (True, False)]
        scale = (scale[0] * scale[1]).sqrt()
        [head] = [x for x in network.modules() if getattr(x, "out_features", 0) == CLASSES]
        head.weight /= scale
        head.bias /= scale
    return network, images.permute(0, 2, 3, 1).contiguous().numpy()


def through_a_file(network, path):
    """What our import makes of the network's checkpoint."""
    content = {"epoch": 7, "arch": "some", "state_dict": network.state_dict(), "best_acc": 41.5}
    if hasattr(network, "router"):
        content["router"] = network.router.state_dict()
    torch.save(content, path)
    return torch_checkpoint.read(path)


def config_of(name, kind, gate="straight_through"):
    experts, ratio = KINDS[kind]
    return CNN(
        name, num_experts=experts, ratio=ratio, width=NETWORKS[name][0], block_size=8, gate=gate,
        raw_widening=name in RAW, mean=MEAN, std=STD, router=RouterSettings(width=4, blocks=2),
    )  # fmt: skip


def in_torch(network, images, gate, train):
    """Logits, gradient of a weighted sum of them to the images, experts; leaves the statistics."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().requires_grad_()
    logits, chosen = classify(network.train(train), images, gate)
    (logits * torch.from_numpy(WEIGHTS)).sum().backward()
    gradient = images.grad.permute(0, 2, 3, 1).numpy()
    return logits.detach().numpy(), gradient, None if chosen is None else chosen.numpy()


def weighted(logits):
    return jnp.sum(logits * WEIGHTS)


def ours(settings, with_gradient=True):
    """Both modes and both gates in one program: nearly all of the time is compilation."""
    model = nnx.eval_shape(
        lambda: settings.create(in_channels=3, num_classes=CLASSES, rngs=nnx.Rngs(0))
    )
    net = functional(model)[0]

    def forward(images, params, stats, train, is_softmax):
        routing, after = net.route(params, stats, images, train=train)
        if routing is not None:
            softmax = choose(routing.scores, 1, "softmax").weights
            weights = jnp.where(is_softmax, softmax, routing.weights)
            routing = routing._replace(weights=weights)
        output, stats = net.apply(params, stats, images, train=train, routing=routing)
        if routing is not None:
            stats = {"router": after["router"], "experts": stats["experts"]}
        return weighted(output.logits), (output.logits, routing, stats)

    @jax.jit
    def run(params, stats, images, is_softmax):
        def one(train):
            given = (images, params, stats, train, is_softmax)
            if not with_gradient:
                logits, routing, after = forward(*given)[1]
                return logits, None, routing, after
            gradient, (logits, routing, after) = jax.grad(forward, has_aux=True)(*given)
            return logits, gradient, routing, after

        return one(False), one(True)

    return run


def check_close(theirs, logits, gradient, routing):
    expected, expected_gradient, chosen = theirs
    assert 0.3 < expected.std() < 10
    error = np.abs(logits - expected).max()
    assert error <= 1e-4
    if chosen is not None:
        assert 4 < np.sum(chosen) < 28  # both experts are used
        np.testing.assert_array_equal(routing.indices[:, 0, 0], chosen)
    if gradient is None:
        return
    off, norm = (
        np.sqrt(np.sum(np.square(x), (1, 2, 3)))
        for x in (gradient - expected_gradient, expected_gradient)
    )
    assert np.mean(norm > 0) > 0.5
    relative = off / np.maximum(norm, 1e-6)
    print(
        f"logits {expected.std():.2f}, off by {error:.1e}; gradients off by "
        f"{np.median(relative):.1e} in the median, {np.max(relative):.1e} at most"
    )
    # An activation within rounding of zero may be on here and off there.
    assert np.mean(relative <= 1e-3) >= 0.9


def check_statistics(name, network, stats, params):
    """The running statistics after a training pass, in PyTorch's names."""
    found = torch_names.to_torch(name, params, stats)
    compared = 0
    for key, tensor in network.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            np.testing.assert_allclose(found[key], tensor.numpy(), rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared or name == "vgg16"


QUICK = ("vgg16", "dense")


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=[] if case == QUICK else pytest.mark.slow) for case in CASES],
)
def test_as_in_pytorch(tmp_path, name, kind):
    assert compare(tmp_path, name, kind) == (4 if kind == "moe" else 2)


@pytest.mark.parametrize("name", ["resnet18_cifar", "vgg16_bn"])
def test_logits_routes_and_statistics_of_a_mixture_of_each_family(tmp_path, name):
    assert compare(tmp_path, name, "moe", with_gradient=False) == 4


def compare(tmp_path, name, kind, with_gradient=True):
    """Everything in both modes, of a mixture with either gate; says in how many ways."""
    network, images = create(name, kind)
    settings = config_of(name, kind)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    checkpoint = through_a_file(network, tmp_path / "checkpoint.pth.tar")
    params, stats = torch_checkpoint.arrays_of(settings, checkpoint)
    run = ours(settings, with_gradient)
    ways = 0
    for gate in ("straight_through", "softmax") if kind == "moe" else ("straight_through",):
        found = run(params, stats, images, jnp.array(gate == "softmax"))
        for train, (*here, _) in zip((False, True), found, strict=True):
            check_close(in_torch(network, images, gate, train), *here)
            ways += 1
        check_statistics(name, network, found[1][-1], params)
        network.load_state_dict(before)
    return ways
