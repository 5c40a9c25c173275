"""AutoAttack beside its authors' code, on the weights of one run: both must find the same images.

    git clone https://github.com/fra31/auto-attack
    python -m advmoe_jax.train --config=configs/cifar10_resnet18.py --workdir=runs/dense \\
        --config.model.num_experts=1 --config.model.width=16 --config.model.ratio=1.0 \\
        --config.method=at
    python -m benchmarks.official_autoattack --official=auto-attack --workdir=runs/dense

The run is a dense CIFAR ResNet of basic blocks. It is attacked as a stranger would have written it,
without anything of this package: as a plain JAX function of images [B, H, W, C] or [B, C, H, W], in
flax.linen, in Equinox; the official code attacks it in PyTorch. Needs the extra ``[test]``.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console

import advmoe_jax as am
from advmoe_jax import cli
from advmoe_jax.attacks import autoattack, linf
from advmoe_jax.data.augment import to_float
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.results import provenance
from advmoe_jax.runs import build
from advmoe_jax.types import Images, Logits
from benchmarks.figures import Figure, table, write_json
from benchmarks.foreign_networks import WRITINGS, read_weights, torch_network

SUITE = "official autoattack"
PLANS = {"apgd-ce": ("apgd-ce",), "standard": ("apgd-ce", "apgd-t", "fab-t", "square")}
BARS = {"apgd-ce": 0.33, "standard": 0.5}

OFFICIAL = flags.DEFINE_string("official", None, "checkout of the official code")
WORKDIR = flags.DEFINE_string("workdir", None, "run of a dense CIFAR ResNet", allow_override=True)
EXAMPLES = flags.DEFINE_integer("examples", 200, "test images, from the first on")
QUERIES = flags.DEFINE_integer("num_queries", 5000, "of Square; 5000 is the standard")
VERSIONS = flags.DEFINE_list("versions", list(PLANS), "of AutoAttack: apgd-ce, standard")
WRITTEN = flags.DEFINE_list("written", list(WRITINGS), f"how: {', '.join(WRITINGS)}")
JSON = flags.DEFINE_string("json", "", "file to write the figures to", allow_override=True)


class Verdict(NamedTuple):
    """Which images withstood, and what it took."""

    robust: np.ndarray
    wall: float
    cpu: float


def main() -> None:
    """Attacks all ways, version by version, and prints a table."""
    console = Console()
    _check_flags()
    found = list(figures(console))
    console.print(table(SUITE, found))
    if JSON.value:
        write_json(Path(JSON.value), provenance(len(jax.devices())), found)


def _check_flags() -> None:
    for flag, known in ((VERSIONS, PLANS), (WRITTEN, WRITINGS)):
        for name in set(flag.value) - set(known):
            raise UserError(f"--{flag.name}={name} is unknown; choose from {', '.join(known)}")
    for flag in (EXAMPLES, QUERIES):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be positive")
    needed = ((OFFICIAL, "checkout of the official code"), (WORKDIR, "run of a dense CIFAR ResNet"))
    for flag, what in needed:
        if not flag.value:
            raise UserError(f"--{flag.name} is missing; it names the {what}")
    if not (Path(OFFICIAL.value) / "autoattack").is_dir():
        raise UserError(f"--official={OFFICIAL.value} holds no folder autoattack")


def figures(console: Console) -> Iterator[Figure]:
    """The rows: shares of the official code's wall time, and flags that agree."""
    run = am.load(WORKDIR.value)
    test = build.subset(run.images.test, EXAMPLES.value)
    images, labels = np.asarray(to_float(test.images[:])), np.asarray(test.labels)
    weights, epsilon = read_weights(run), run.config.attack.epsilon
    functions = {name: WRITINGS[name](weights) for name in WRITTEN.value}
    network = torch_network(weights)
    for name, function in functions.items():
        apart = np.abs(np.asarray(function(images[:8])) - _torch_logits(network, images[:8])).max()
        console.print(f"{name}: logits at most {apart:.1e} from PyTorch's", highlight=False)
    for version in VERSIONS.value:
        official = attack_officially(network, images, labels, epsilon, PLANS[version])
        console.print(f"official {version}: {_told(official)}", highlight=False)
        for name, function in functions.items():
            ours = attack(function, images, labels, epsilon, PLANS[version])
            console.print(f"{name} {version}: {_told(ours)}", highlight=False)
            same = float(np.mean(ours.robust == official.robust))
            what = f"{version}, {name}, {len(labels)} images"
            bar = BARS[version]
            yield Figure(SUITE, f"{what}: wall time over official", ours.wall / official.wall, bar)
            yield Figure(SUITE, f"{what}: CPU time over official", ours.cpu / official.cpu)
            yield Figure(SUITE, f"{what}: same flags", same, 0.99, "share", at_least=True)


def _told(verdict: Verdict) -> str:
    robust = f"{verdict.robust.mean():.1%} robust"
    return f"{robust}, {verdict.wall:.1f} s, {verdict.cpu:.1f} s of CPU"


def attack(
    function: Callable[[Images], Logits],
    images: np.ndarray,
    labels: np.ndarray,
    epsilon: float,
    names: tuple[str, ...],
) -> Verdict:
    """This package's AutoAttack on a function, compilation included."""
    run = autoattack(linf(epsilon), "custom", attacks=names, num_queries=QUERIES.value)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run(function, images, labels, 0, batch_size=len(labels), progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Verdict(np.asarray(result.robust), wall, cpu)


def attack_officially(
    network: Any, images: np.ndarray, labels: np.ndarray, epsilon: float, names: tuple[str, ...]
) -> Verdict:
    """The official code's, on a PyTorch network."""
    import torch

    sys.path.insert(0, str(Path(OFFICIAL.value).resolve()))
    from autoattack import AutoAttack

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(labels.astype(np.int64))
    run = AutoAttack(network, eps=epsilon, seed=0, verbose=False, device="cpu", version="custom")
    run.attacks_to_run = list(names)
    run.apgd.n_restarts, run.fab.n_restarts = 1, 1
    run.apgd_targeted.n_target_classes = run.fab.n_target_classes = 9
    run.square.n_queries = QUERIES.value
    wall, cpu = time.perf_counter(), time.process_time()
    found = run.run_standard_evaluation(x, y, bs=len(y))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with torch.inference_mode():
        right = network(x).argmax(1).eq(y) & network(found).argmax(1).eq(y)
    return Verdict(right.numpy(), wall, cpu)


def _torch_logits(network: Any, images: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


if __name__ == "__main__":
    cli.run(main, needs=())
