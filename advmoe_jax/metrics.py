"""``metrics.jsonl``: what training and validation measured, one line an epoch.

Training writes it (``training.log``); reports and comparisons read it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from advmoe_jax.files import read_json_lines

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The epochs of a ``metrics.jsonl``, in order; none if there is no file."""
    return epochs_of(read_json_lines(path)[0])


def epochs_of(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries that describe an epoch, in order; of an epoch that is there twice, the last."""
    epochs = {
        entry["epoch"]: dict(entry)
        for entry in entries
        if isinstance(entry.get("epoch"), int) and isinstance(entry.get("step"), int)
    }
    return [epochs[epoch] for epoch in sorted(epochs)]
