"""Eager PyTorch networks to compare with, in the shape of the published systems.

``ResNet18`` computes all N experts of a layer with one convolution, N times as wide, and masks:
what a PyTorch user gets from running the published approach. ``published_step`` makes the passes of
the published AdvMoE step: 18 of the network, each of both experts, and more of the router.
``advmoe_step`` makes the 16 that suffice, as ours does, so that what is compared is how a pass is
computed, not how many there are. Written for the benchmark; nothing in the package needs it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = 0.5, 0.25  # as in networks.py


class EveryExpertConv(nn.Module):
    """All experts' output channels at once, then the chosen expert's: images and one-hot in."""

    def __init__(
        self, in_channels: int, channels: int, size: int, stride: int, experts: int
    ) -> None:
        super().__init__()
        self.experts = experts
        self.conv = nn.Conv2d(in_channels, experts * channels, size, stride, size // 2, bias=False)

    def forward(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        """[B, C, H, W] and [B, N] -> [B, C', H', W']."""
        every = self.conv(x)
        if self.experts == 1:
            return every
        every = every.unflatten(1, (self.experts, -1))
        return (every * chosen[:, :, None, None, None]).sum(1)


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, experts: int) -> None:
        super().__init__()
        self.conv1 = EveryExpertConv(in_channels, channels, 3, stride, experts)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = EveryExpertConv(channels, channels, 3, 1, experts)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x, chosen)))
        return F.relu(self.bn2(self.conv2(y, chosen)) + self.shortcut(x))


class ResNet18(nn.Module):
    """CIFAR ResNet-18; with experts, each ``ratio`` times as wide."""

    def __init__(self, experts: int = 1, ratio: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        channels, blocks = 64, []
        for stage in range(4):
            planes = int(64 * 2**stage * ratio)
            for i in range(2):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(_Block(channels, planes, stride, experts))
                channels = planes
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] (and one-hot routes [B, N]) -> logits [B, 10]."""
        x = F.relu(self.bn(self.stem((images - MEAN) / STD)))
        for block in self.blocks:
            x = block(x, chosen)
        return self.head(x.mean((2, 3)))


class Router(nn.Module):
    """ResNet-20 with one score per expert, shortcuts padded with zero channels."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        channels, blocks = 16, []
        for stage in range(3):
            for i in range(3):
                planes, stride = 16 << stage, 2 if stage > 0 and i == 0 else 1
                blocks.append(_RouterBlock(channels, planes, stride))
                channels = planes
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, experts)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> scores [B, N]."""
        x = F.relu(self.bn(self.stem((images - MEAN) / STD)))
        return self.head(self.blocks(x).mean((2, 3)))


class _RouterBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.extra, self.extra)))


def one_hot(scores: Tensor) -> Tensor:
    """The largest score's one-hot, float [B, N]."""
    return F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)


def inference(network: ResNet18, router: Router | None, images: Tensor) -> Callable[[], Tensor]:
    """One pass without gradients."""
    network.eval()
    if router is not None:
        router.eval()

    def run() -> Tensor:
        with torch.inference_mode():
            return network(images, None if router is None else one_hot(router(images)))

    return run


class Recipe(NamedTuple):
    """Attack and loss of an AdvMoE step."""

    epsilon: float
    step_size: float
    num_steps: int
    weight: float


def published_step(
    network: ResNet18, router: Router, images: Tensor, labels: Tensor, recipe: Recipe
) -> Callable[[], Tensor]:
    """One AdvMoE alternation (assignment objective) with every pass of the published step."""
    optimizers = _sgd(network), _sgd(router)
    weight = recipe.weight

    def classify(x: Tensor) -> Tensor:
        scores = router(x)
        return network(x, one_hot(scores) + scores - scores.detach())

    def attack(scores: Tensor) -> Tensor:
        _mode(False, network, router)
        clean = classify(images), scores
        return _attack(lambda x: (classify(x), router(x)), images, clean, recipe)

    def step() -> Tensor:
        _mode(True, network, router)
        scores = router(images)
        classify(images)
        attacked = attack(scores.detach())
        _mode(True, network, router)
        natural, robust = classify(images), classify(attacked)
        loss = F.cross_entropy(natural, labels) + weight * _kl(robust, natural) / len(images)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

        attacked = attack(scores.detach())
        _mode(True, network, router)
        classify(images)
        _assign(optimizers[1], scores, router(attacked), labels, weight)
        return loss.detach()

    return step


def advmoe_step(
    network: ResNet18, router: Router, images: Tensor, labels: Tensor, recipe: Recipe
) -> Callable[[], Tensor]:
    """One AdvMoE alternation (assignment objective), with the passes that ours makes."""
    optimizers = _sgd(network), _sgd(router)
    weight = recipe.weight

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = router(x)
        return network(x, one_hot(scores)), scores

    def attack(clean: Sequence[Tensor]) -> Tensor:
        _mode(False, network, router)
        return _attack(outputs, images, clean, recipe)

    def step() -> Tensor:
        _trainable(False, network, router)
        _mode(False, network, router)
        with torch.no_grad():
            clean = outputs(images)
            route = one_hot(clean[1])
        attacked = attack(clean)
        with torch.no_grad():
            attacked_route = one_hot(router(attacked))
        _trainable(True, network)
        network.train()
        natural, robust = network(images, route), network(attacked, attacked_route)
        loss = F.cross_entropy(natural, labels) + weight * _kl(robust, natural) / len(images)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()

        _trainable(False, network)
        _mode(False, network, router)
        with torch.no_grad():
            clean = (network(images, route), clean[1])
        attacked = attack(clean)
        _trainable(True, router)
        router.train()
        _assign(optimizers[1], router(images), router(attacked), labels, weight)
        return loss.detach()

    return step


def _sgd(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(part.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _attack(
    outputs: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    clean: Sequence[Tensor],
    recipe: Recipe,
) -> Tensor:
    """The joint attack: KL of logits and of scores."""
    x = images + 0.001 * torch.randn_like(images)
    for _ in range(recipe.num_steps):
        x = x.detach().requires_grad_()
        loss = sum(_kl(a, c) for a, c in zip(outputs(x), clean, strict=True))
        (gradient,) = torch.autograd.grad(loss, x)
        x = torch.clamp(x.detach() + recipe.step_size * gradient.sign(), 0, 1)
        x = torch.clamp(x, images - recipe.epsilon, images + recipe.epsilon)
    return x.detach()


def _assign(
    optimizer: torch.optim.Optimizer,
    natural: Tensor,
    robust: Tensor,
    labels: Tensor,
    weight: float,
) -> None:
    """The router's update from its scores of clean and of attacked images."""
    loss = F.cross_entropy(natural, labels % natural.shape[1])
    optimizer.zero_grad()
    (weight * (loss + _kl(robust, natural) / len(labels))).backward()
    optimizer.step()


def _trainable(flag: bool, *modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(flag)


def _mode(train: bool, *modules: nn.Module) -> None:
    for module in modules:
        module.train(train)


def _kl(attacked: Tensor, clean: Tensor) -> Tensor:
    """Sum over the batch of KL(softmax(clean) || softmax(attacked))."""
    return F.kl_div(
        F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="sum", log_target=True
    )
