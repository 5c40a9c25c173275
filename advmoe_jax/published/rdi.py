"""RDI-Nets' published networks: their exits, and the names of their parts.

The code is https://github.com/VITA-Group/triple-wins. Rules are those of ``torch_names``: from our
modules to theirs.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


class Published(NamedTuple):
    """What the published code has of a network.

    Attributes:
        arch: its name there.
        exits: the blocks behind which side exits are.
        rules: names.
        spatial: our linear layers that read flattened feature maps, and the maps' height.
        unused: modules of theirs that nothing calls, and the shape of their weight.
    """

    arch: str
    exits: tuple[int, ...]
    rules: Rules
    spatial: dict[str, int] = {}  # noqa: RUF012
    unused: dict[str, tuple[int, ...]] = {}  # noqa: RUF012


def _in_sequence(number: int, **modules: int) -> Rules:
    """Rules of the head of a side exit, whose modules they have as a sequence."""
    return tuple(
        (
            rf"exits/exit{number}/{ours}((?:/\w+)*)",
            lambda m, theirs=theirs: f"branch_layer{number}.{theirs}{m[1].replace('/', '.')}",
        )
        for ours, theirs in modules.items()
    )


def _shortcut(pattern: str, theirs: Callable[[re.Match[str]], str], child: str) -> Rules:
    return tuple(
        (rf"{pattern}/shortcut_{part}", lambda m, i=i: f"{theirs(m)}.{child}.{i}")
        for i, part in enumerate(("conv", "bn"))
    )


def _group(match: re.Match[str]) -> str:
    return f"group{int(match[1]) - 1}_layer{match[2]}"


def _layer(match: re.Match[str]) -> str:
    return f"layer{int(match[1]) + 1}"


_GROUPS, _INVERTED = r"layer(\d)_(\d+)", r"block(\d+)"
_CONVOLUTIONS = {"conv1": 1, "bn1": 2, "conv2": 5, "bn2": 6, "head": 9}
NETWORKS = {
    "resnet38_cifar": Published(
        "cifar10_resnet_38",
        (2, 5, 8, 11, 14, 17),
        (
            ("stem", "conv1"),
            ("bn", "bn1"),
            *_shortcut(_GROUPS, _group, "downsample"),
            (rf"{_GROUPS}/(\w+)", lambda m: f"{_group(m)}.{m[3]}"),
            ("head", "fc"),
            *_in_sequence(1, **_CONVOLUTIONS),
            *_in_sequence(2, **_CONVOLUTIONS),
            *_in_sequence(3, block=1, head=4),
            *_in_sequence(4, block=1, head=4),
            *_in_sequence(5, head=2),
            *_in_sequence(6, head=2),
        ),
    ),
    "small_cnn": Published(
        "mnist_smallcnn",
        (1, 3),
        (
            (r"(conv\d)", r"\1"),
            (r"hidden(\d)", r"fc\1"),
            ("head", "fc3"),
            *_in_sequence(1, conv=0, hidden1=3, hidden2=5, head=6),
            *_in_sequence(2, hidden1=2, hidden2=4, head=5),
        ),
        spatial={"hidden1": 4, "exits/exit1/hidden1": 6, "exits/exit2/hidden1": 5},
    ),
    "mobilenet_v2": Published(
        "cifar10_mobilenet_v2",
        (1, 4, 7, 9, 12, 15),
        (
            ("stem", "layer1"),
            ("bn", "bn1"),
            *_shortcut(_INVERTED, _layer, "shortcut"),
            (rf"{_INVERTED}/(\w+)", lambda m: f"{_layer(m)}.{m[2]}"),
            ("conv", "layer19"),
            ("last_bn", "bn2"),
            ("head", "linear"),
            *_in_sequence(1, block1=0, bn1=1, block2=3, bn2=4, head=7),
            *_in_sequence(2, block1=0, head=3),
            *(rule for number in (3, 4, 5, 6) for rule in _in_sequence(number, head=2)),
        ),
        unused={"conv2": (1280, 320, 1, 1)},
    ),
}
