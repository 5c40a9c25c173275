"""Measures, prints a table a suite, and writes JSON: ``python -m benchmarks.run``."""

import datetime
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.results import provenance
from benchmarks import (
    against_torch,
    attack,
    dispatch,
    exits,
    inference,
    pipeline,
    scaling,
    tokens,
    training,
)
from benchmarks.figures import Figure, table, write_json

SUITES = ("dispatch", "tokens", "inference", "training", "attack", "scaling", "exits", "pipeline")
DEVICES = ("cpu", "gpu", "tpu")

SUITE = flags.DEFINE_string("suite", "", f"comma-separated, of {', '.join(SUITES)}; empty: all")
DEVICE = flags.DEFINE_string("device", "", f"{', '.join(DEVICES)}; empty: JAX's default")
JSON = flags.DEFINE_string("json", "", "file to write the figures to")
BATCH = flags.DEFINE_integer("batch_size", 128, "images of every suite's batch")
LARGE_BATCH = flags.DEFINE_integer(
    "large_batch_size", 512, "images of dispatch by count and of exits"
)


def main() -> None:
    """Runs the suites that the flags ask for."""
    chosen = tuple(filter(None, SUITE.value.split(","))) or SUITES
    for name in chosen:
        if name not in SUITES:
            raise UserError(f"--suite={name} is unknown; choose one of {', '.join(SUITES)}")
    _use_device(DEVICE.value)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    machine = _machine()
    console.print(
        f"{machine['device']}, jax {machine['versions']['jax']}, {machine['date']}",
        highlight=False,
    )
    suites: dict[str, Callable[[], Iterable[Figure]]] = {
        "dispatch": lambda: dispatch.figures(BATCH.value, LARGE_BATCH.value),
        "tokens": lambda: tokens.figures(BATCH.value),
        "inference": lambda: inference.figures(BATCH.value),
        "training": lambda: training.figures(BATCH.value),
        "attack": lambda: attack.figures(BATCH.value),
        "scaling": lambda: scaling.figures(BATCH.value),
        "exits": lambda: exits.figures(LARGE_BATCH.value),
        "pipeline": lambda: pipeline.figures(BATCH.value),
    }
    found: list[Figure] = []
    for name in chosen:
        with console.status(f"measuring {name}"):
            of_suite = list(suites[name]())
        console.print(table(name, of_suite))
        found += of_suite
        if JSON.value:  # after every suite, so that an interrupted run keeps what it measured
            write_json(Path(JSON.value), machine, found)


def _use_device(name: str) -> None:
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # used by the suite of training
    if not name:
        return
    if name not in DEVICES:
        raise UserError(f"--device={name} is unknown; choose one of {', '.join(DEVICES)}")
    jax.config.update("jax_platforms", name if name == "cpu" else f"{name},cpu")
    try:
        jax.devices(name)
    except RuntimeError:
        raise UserError(f"--device={name}: this machine has none that JAX can use") from None


def _machine() -> dict[str, Any]:
    import importlib.metadata

    machine = provenance(len(jax.devices()))
    if against_torch.available():
        machine["versions"]["torch"] = importlib.metadata.version("torch")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"device": machine["device"], "date": date, **machine}


if __name__ == "__main__":
    cli.run(main, needs=())
