"""What ``results.json`` says of a run: numbers, and where they come from."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from advmoe_jax.evaluation.accuracy import Outcome, agreement, routing_summary
from advmoe_jax.files import read_json, write_json
from advmoe_jax.routing import measures

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
RESULTS = "results.json"


def measured(
    outcomes: Mapping[str, Outcome], settings: Mapping[str, Mapping[str, Any]], num_experts: int
) -> dict[str, Any]:
    """The part of the results that an evaluation measures.

    Args:
        outcomes: by attack; ``clean`` among them.
        settings: by attack, what to note beside its numbers.
        num_experts: of the network.
    """
    clean = outcomes["clean"]
    attacked = {name: o for name, o in outcomes.items() if name != "clean"}
    routing = routing_summary(clean, num_experts)
    if routing is not None:
        routing["agreement"] = {name: agreement(clean, o) for name, o in attacked.items()}
        if "layers" in routing:
            routing["layers"]["agreement"] = {
                name: measures.agreement(clean.choices, o.choices).tolist()
                for name, o in attacked.items()
            }
    return {
        "standard_accuracy": clean.accuracy,
        "robust_accuracy": {name: o.accuracy for name, o in attacked.items()},
        "attacks": {name: dict(settings[name]) for name in outcomes},
        "routing": routing,
        "images_per_second": {
            name: round(len(o.correct) / max(o.seconds, 1e-9), 1) for name, o in outcomes.items()
        },
    }


def merge(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """``new``, with attacks that only ``old`` has measured on the same parameters kept."""
    merged = dict(new)
    if not old or old.get("evaluated") != new.get("evaluated"):
        return merged
    for name in ("robust_accuracy", "attacks", "images_per_second"):
        merged[name] = {**old.get(name, {}), **new[name]}
    if new["routing"] is not None:
        merged["routing"] = _with_agreement(old.get("routing"), new["routing"])
        if "layers" in new["routing"]:
            layers = (old.get("routing") or {}).get("layers")
            merged["routing"]["layers"] = _with_agreement(layers, new["routing"]["layers"])
    return merged


def attack_warnings(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the attacks of a results file had to say, a sentence each, with their names."""
    return [
        f"{name}: {warning}"
        for name, settings in attacks.items()
        for warning in settings.get("warnings", [])
    ]


def _with_agreement(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    return {**new, "agreement": {**(old or {}).get("agreement", {}), **new["agreement"]}}


def provenance(num_devices: int) -> dict[str, Any]:
    """The devices in use, package versions and git commit of this process."""
    device = jax.devices()[0]
    return {
        "device": f"{num_devices} x {device.device_kind} ({platform.machine()}, {_cpus()} CPUs)",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "git_commit": git_commit(),
    }


def _cpus() -> int:
    """Processors this process may use: XLA's sums on CPU, and so the last bits, depend on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git_commit() -> str | None:
    """Commit of the source tree, ``-dirty`` if tracked files differ; None outside a checkout."""
    source = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != source:
            return None
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_results(workdir: Path, results: Mapping[str, Any]) -> Path:
    """Writes ``results.json`` whole or not at all."""
    return write_json(workdir / RESULTS, results)


def read_results(workdir: Path) -> dict[str, Any] | None:
    """What ``write_results`` wrote, or None if there is none.

    Raises:
        UserError: if the file is damaged.
    """
    return read_json(workdir / RESULTS)
