"""What AutoAttack costs: ``python -m benchmarks.autoattack``.

Two figures: the share of the time that goes to compilation, and what is saved by sending images
away as soon as they are fooled, over attacking every image with every attack. The network is not
trained; epsilon is chosen by bisection so that about half of the images survive, as they do on a
robust network. On CPU a ResNet-18 takes hours: ``--examples=100 --nopacking`` for the first
figure alone, ``--network=resnet10_cifar --width=8`` for both in minutes.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.attacks import Threat, apgd, autoattack, fab, linf, pgd, square
from advmoe_jax.evaluation import views
from advmoe_jax.evaluation.results import provenance
from advmoe_jax.models import CNN, functional
from advmoe_jax.types import Array, Images, Logits
from benchmarks.figures import Figure, table, write_json
from benchmarks.networks import CLASSES, SIZE

SUITE = "autoattack"

NETWORK = flags.DEFINE_string("network", "resnet18_cifar", "name of the architecture")
WIDTH = flags.DEFINE_integer("width", 0, "channels of its first convolution; 0: as published")
EXAMPLES = flags.DEFINE_integer("examples", 100, "images")
BATCH = flags.DEFINE_integer("batch_size", 100, "images attacked at once", allow_override=True)
QUERIES = flags.DEFINE_integer("num_queries", 5000, "of Square; 5000 is the standard")
PACKING = flags.DEFINE_bool("packing", True, "measure every image under every attack, too")
JSON = flags.DEFINE_string("json", "", "file to write the figures to", allow_override=True)


def main() -> None:
    """Measures what the flags ask for, and prints a table."""
    console = Console()
    found = list(figures(console))
    console.print(table(SUITE, found))
    if JSON.value:
        write_json(Path(JSON.value), provenance(len(jax.devices())), found)


def figures(console: Console) -> Iterator[Figure]:
    """The rows; what the attacks did is printed as they come."""
    function = _pathway()
    images = np.asarray(jax.random.uniform(jax.random.key(0), (EXAMPLES.value, SIZE, SIZE, 3)))
    labels = np.asarray(jnp.argmax(function(images), axis=1), np.int32)
    threat = linf(_epsilon(function, images, labels))
    console.print(f"{NETWORK.value}, {len(images)} images, epsilon {255 * threat.epsilon:.3f}/255")
    run = autoattack(threat, num_queries=QUERIES.value)
    began = time.perf_counter()
    key = jax.random.key(1)
    result = run(function, images, labels, key, batch_size=BATCH.value, progress=False)
    whole = time.perf_counter() - began
    # A call of the device without its compilation takes what the others take.
    compiling = 0.0
    for name, report in result.attacks.items():
        later = (report.seconds - report.first_call_seconds) / max(report.calls - 1, 1)
        compiling += max(report.first_call_seconds - later, 0)
        console.print(f"{name}: {report}", highlight=False)
    name = f"{NETWORK.value} pathway, {len(images)} images, RA {result.robust_accuracy:.0%}"
    yield Figure(SUITE, f"{name}: share of compilation in {whole:.0f} s", compiling / whole, 0.05)
    if PACKING.value:
        every = sum(_every_image(function, attack, images, labels) for attack in _parts(threat))
        saved = f"{name}: every image under every attack ({every:.0f} s) over packed"
        yield Figure(SUITE, saved, every / (whole - compiling), 2.0, at_least=True)


def _pathway() -> Callable[[Images], Logits]:
    """One pathway of a half-width MoE, as a function of images."""
    cnn = CNN(NETWORK.value, ratio=0.5, width=WIDTH.value)
    model = cnn.create(in_channels=3, num_classes=CLASSES, rngs=nnx.Rngs(0))
    return views.logits(*functional(model))


def _epsilon(function: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """The radius within which PGD-20 on the margin leaves 60% of the first batch's images."""
    images, labels = images[: BATCH.value], labels[: BATCH.value]

    @jax.jit
    def accuracy(function: Any, epsilon: Array) -> Array:
        attack = pgd(linf(epsilon), num_steps=20, step_size=epsilon / 6, loss="margin")
        found = attack(function, images, labels, jax.random.key(2))
        return jnp.mean(jnp.argmax(function(found), axis=1) == labels)

    low, high = 0.0, 16 / 255
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if accuracy(function, middle) > 0.6 else (low, middle)
    return high


def _parts(threat: Threat) -> list[Callable[..., Array]]:
    return [
        apgd(threat),
        apgd(threat, loss="dlr_targeted"),
        fab(threat, targeted=True),
        square(threat, num_queries=QUERIES.value),
    ]


def _every_image(function: Any, attack: Any, images: np.ndarray, labels: np.ndarray) -> float:
    """Seconds, compilation excluded."""
    size, key = min(BATCH.value, len(images)), jax.random.key(1)
    program = jax.jit(lambda f, *given: attack(f, *given))
    compiled = program.lower(function, images[:size], labels[:size], key).compile()
    begins = range(0, len(images) - size + 1, size)
    began = time.perf_counter()
    for begin in begins:
        rows = slice(begin, begin + size)
        compiled(function, images[rows], labels[rows], key).block_until_ready()
    return (time.perf_counter() - began) * len(images) / (len(begins) * size)


if __name__ == "__main__":
    cli.run(main, needs=())
