"""Eager PyTorch networks to compare with, in the shape of the published systems.

``ResNet18`` computes all N experts of a layer with one convolution, N times as wide, and masks:
what a PyTorch user gets from running the published approach. The AdvMoE step below makes the same
passes as ours (16 of the pathway), so that what is compared is how a pass is computed, not how many
there are. Written for the benchmark; nothing in the package needs it.
"""

from collections.abc import Callable, Sequence

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


def advmoe_step(
    network: ResNet18,
    router: Router,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    weight: float,
) -> Callable[[], Tensor]:
    """One AdvMoE alternation (assignment objective), with the passes that ours makes."""
    sgd = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    optimizers = [torch.optim.SGD(part.parameters(), **sgd) for part in (network, router)]
    assigned = labels % router.head.out_features

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        scores = router(x)
        return network(x, one_hot(scores)), scores

    def attack(clean: Sequence[Tensor]) -> Tensor:
        _mode(False, network, router)
        x = images + 0.001 * torch.randn_like(images)
        for _ in range(num_steps):
            x = x.detach().requires_grad_()
            loss = sum(_kl(a, c) for a, c in zip(outputs(x), clean, strict=True))
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.clamp(x.detach() + step_size * gradient.sign(), 0, 1)
            x = torch.clamp(x, images - epsilon, images + epsilon)
        return x.detach()

    def descend(part: int, loss: Tensor) -> None:
        optimizers[part].zero_grad()
        loss.backward()
        optimizers[part].step()

    def step() -> Tensor:
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for parameter in router.parameters():
            parameter.requires_grad_(False)
        _mode(False, network, router)
        with torch.no_grad():
            clean = outputs(images)
            route = one_hot(clean[1])
        attacked = attack(clean)
        with torch.no_grad():
            attacked_route = one_hot(router(attacked))
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        network.train()
        natural, robust = network(images, route), network(attacked, attacked_route)
        loss = F.cross_entropy(natural, labels) + weight * _kl(robust, natural) / len(images)
        descend(0, loss)

        for parameter in network.parameters():
            parameter.requires_grad_(False)
        _mode(False, network, router)
        with torch.no_grad():
            clean = (network(images, route), clean[1])
        attacked = attack(clean)
        for parameter in router.parameters():
            parameter.requires_grad_(True)
        router.train()
        natural, robust = router(images), router(attacked)
        assignment = weight * F.cross_entropy(natural, assigned)
        descend(1, assignment + weight * _kl(robust, natural) / len(images))
        return loss.detach()

    return step


def _mode(train: bool, *modules: nn.Module) -> None:
    for module in modules:
        module.train(train)


def _kl(attacked: Tensor, clean: Tensor) -> Tensor:
    """Sum over the batch of KL(softmax(clean) || softmax(attacked))."""
    return F.kl_div(
        F.log_softmax(attacked, 1), F.log_softmax(clean, 1), reduction="sum", log_target=True
    )
