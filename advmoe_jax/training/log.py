"""What a run writes while it trains: ``metrics.jsonl``, TensorBoard events, one line an epoch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from advmoe_jax import storage
from advmoe_jax.files import write_text
from advmoe_jax.metrics import METRICS, read_metrics


class Shown(NamedTuple):
    """What TensorBoard shows besides curves.

    Attributes:
        histograms: values by name.
        pictures: uint8 [height, width, 3] by name.
    """

    histograms: Mapping[str, np.ndarray]
    pictures: Mapping[str, np.ndarray]


class RunLog:
    """Log of a run in its directory; silent in every process but the first.

    Args:
        workdir: the run's directory.
        step: completed steps; lines and events of later steps (of a run that was cut off after
            its last checkpoint) are removed.
        console: where people read.
        enabled: False to write and print nothing.
    """

    def __init__(self, workdir: Path, step: int, console: Console, *, enabled: bool = True) -> None:
        self.console, self.enabled = console, enabled
        self._path, self._directory = workdir / METRICS, workdir / "tensorboard"
        self._warned_of: set[str] = set()
        if not enabled:
            return
        self._lines = [_line(entry) for entry in read_metrics(self._path) if entry["step"] <= step]
        self._write_lines()
        from tensorboardX import SummaryWriter

        # Events are appended, which an object cannot be: here first, and copied as a whole.
        self._folder = TemporaryDirectory() if storage.is_remote(workdir) else None
        place = self._folder.name if self._folder else str(self._directory)
        self._events = SummaryWriter(place, purge_step=step + 1)

    def epoch(self, entry: Mapping[str, Any], num_epochs: int) -> None:
        """Records one epoch: docs/runs.md has the fields of ``entry``."""
        if not self.enabled:
            return
        self._lines.append(_line(entry))
        self._write_lines()
        for name, value in _scalars(entry):
            self._events.add_scalar(name, value, entry["step"])
        self._flush()
        self.say(_epoch_line(entry, num_epochs))
        # The line above and the file say it every epoch; people are told once, until it mends.
        subjects = {warning.split(" got ")[0]: warning for warning in entry.get("warnings", [])}
        for subject, warning in subjects.items():
            if subject not in self._warned_of:
                self.warn(warning)
        self._warned_of = set(subjects)

    def show(self, shown: Shown, step: int) -> None:
        """Records histograms and pictures in the events."""
        if not self.enabled:
            return
        for name, values in shown.histograms.items():
            self._events.add_histogram(name, values, step)
        for name, picture in shown.pictures.items():
            self._events.add_image(name, picture, step, dataformats="HWC")
        self._flush()

    def say(self, text: str) -> None:
        """Prints one line."""
        if self.enabled:
            self.console.print(escape(text), highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        if self.enabled:
            self.console.print(f"[bold]warning:[/bold] {escape(text)}", soft_wrap=True)

    def close(self) -> None:
        """Closes the event file."""
        if self.enabled:
            self._events.close()
            self._copy_events()
            if self._folder:
                self._folder.cleanup()

    def _write_lines(self) -> None:
        write_text(self._path, "".join(self._lines))

    def _flush(self) -> None:
        self._events.flush()
        self._copy_events()

    def _copy_events(self) -> None:
        for file in Path(self._folder.name).iterdir() if self._folder else ():
            storage.put(file, self._directory / file.name)


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _scalars(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of an entry by its path, as TensorBoard shows them."""
    for name, value in entry.items():
        if name == "layers":  # curves of every layer would be a thicket: the file has them
            continue
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif name == "load":
            yield from ((f"{prefix}load/expert_{i}", share) for i, share in enumerate(value))
        elif isinstance(value, int | float):
            yield prefix + name, value


def _epoch_line(entry: Mapping[str, Any], num_epochs: int) -> str:
    train, validation = entry["train"], entry["validation"]
    parts = [f"epoch {entry['epoch']:>3}/{num_epochs}", f"loss {train['loss']:.3f}"]
    if "router_loss" in train:
        parts.append(f"router {train['router_loss']:.3f}")
    parts.append(_accuracies("train", train))
    parts.append(_accuracies("validation", validation))
    if validation["routing"] is not None:
        load = "/".join(f"{100 * share:.0f}" for share in validation["routing"]["load"])
        agreement = 100 * validation["routing"]["agreement"]
        parts.append(f"load {load}% entropy {validation['routing']['entropy']:.2f}")
        parts.append(f"routes kept {agreement:.0f}%")
    parts.append(f"{entry['images_per_second']:.0f} images/s")
    return "  ".join(parts)


def _accuracies(name: str, metrics: Mapping[str, Any]) -> str:
    text = f"{name} SA {100 * metrics['standard_accuracy']:.1f}"
    if "robust_accuracy" in metrics:
        text += f" RA {100 * metrics['robust_accuracy']:.1f}"
    return text
