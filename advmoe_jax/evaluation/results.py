"""What ``results.json`` says of a run: numbers, and where they come from."""

import importlib.metadata
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.accuracy import Outcome, agreement, routing_summary
from advmoe_jax.files import read_json, write_json
from advmoe_jax.routing import measures

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
RESULTS = "results.json"


def measured(
    outcomes: Mapping[str, Outcome],
    settings: Mapping[str, Mapping[str, Any]],
    num_experts: int,
    routers: int | None = None,
) -> dict[str, Any]:
    """The part of the results that an evaluation measures.

    Args:
        outcomes: by attack; ``clean`` among them.
        settings: by attack, what to note beside its numbers.
        num_experts: of the network.
        routers: its layers that are routed by themselves; None: one for each decision.
    """
    clean = outcomes["clean"]
    attacked = {name: o for name, o in outcomes.items() if name != "clean"}
    routing = routing_summary(clean, num_experts, routers)
    if routing is not None:
        routing["agreement"] = {name: agreement(clean, o) for name, o in attacked.items()}
        if "layers" in routing:
            routing["layers"]["agreement"] = {
                name: measures.agreement(
                    *(measures.of_layers(x.choices, routers) for x in (clean, o))
                ).tolist()
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
    """``new``, with what ``old`` has measured on the same parameters kept.

    A name alone is the result on the most images: what is new but of fewer stands beside it, named
    by its count, such as ``pgd20@32`` (see ``placed``). The standard accuracy on fewer images is
    in ``standard_accuracy_on_fewer``, under ``clean@32``.
    """
    merged = dict(new)
    if not old or not _are_same(old.get("evaluated"), new["evaluated"]):
        return merged
    merged["evaluated"] = old["evaluated"]
    names = {
        name: placed(old, new["evaluated"], name, settings["examples"])
        for name, settings in new["attacks"].items()
    }
    for group in ("robust_accuracy", "attacks", "images_per_second"):
        merged[group] = old.get(group, {}) | _renamed(new[group], names)
    # What is kept was measured where the old results say, if that is elsewhere.
    where = {x: old[x] for x in ("device", "git_commit") if x in old and old[x] != new.get(x)}
    for name in merged["attacks"].keys() - names.values():
        merged["attacks"][name] = {**where, **merged["attacks"][name]}
    fewer = old.get("standard_accuracy_on_fewer", {})
    if is_fewer := names["clean"] != "clean":
        merged["standard_accuracy"] = old["standard_accuracy"]
        fewer = fewer | {names["clean"]: new["standard_accuracy"]}
    if fewer:
        merged["standard_accuracy_on_fewer"] = fewer
    if (exits := new.get("exits")) is not None:
        before = old.get("exits", {}).get("under", {})
        merged["exits"] = {**exits, "under": before | _renamed(exits["under"], names)}
    if new["routing"] is not None:
        merged["routing"] = _routing(old.get("routing"), new["routing"], names, is_fewer)
    return merged


def placed(
    old: Mapping[str, Any] | None, evaluated: Mapping[str, Any], name: str, examples: int
) -> str:
    """The name under which results of so many images are kept beside those that are there.

    Args:
        old: the results that are there.
        evaluated: the checkpoint that the new ones are of.
        name: of the attack, or ``clean``.
        examples: number of images.
    """
    if not old or not _are_same(old.get("evaluated"), evaluated):
        return name
    there = old.get("attacks", {}).get(name, {}).get("examples", 0)
    return name if examples >= there else f"{name}@{examples}"


def check_nothing_is_lost(
    path: Path, old: Mapping[str, Any] | None, evaluated: Mapping[str, Any], last_sha256: str
) -> None:
    """Raises UserError if results of the same training would give way to those of other weights.

    Those of a run that has been trained on since are of the past, and do.

    Args:
        path: of the results.
        old: the results that are there.
        evaluated: what new ones would be of.
        last_sha256: of the parameters that training ended with.
    """
    if not old or _are_same(old.get("evaluated"), evaluated):
        return
    if old.get("params_sha256") == last_sha256:
        there = old.get("evaluated", {}).get("checkpoint")
        of = "other thresholds" if there == evaluated["checkpoint"] else f"the {there} checkpoint"
        raise UserError(
            f"{path} has what was measured with {of}, which would be lost: give another directory "
            "for these results, such as --out=OTHER, or move that file away"
        )


def _are_same(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two evaluations are of the same weights, whichever checkpoint they were taken for.

    Thresholds that another device has chosen differ by rounding.
    """
    if one is None or one.get("params_sha256") != other.get("params_sha256"):
        return False
    here, there = one.get("thresholds") or [], other.get("thresholds") or []
    return len(here) == len(there) and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5) for a, b in zip(here, there, strict=True)
    )


def name_of_count(results: Mapping[str, Any], name: str, examples: int) -> str:
    """The name under which results have an attack (or ``clean``) on so many images.

    Args:
        results: content of ``results.json``.
        name: of the attack.
        examples: number of images; 0: the most there are.
    """
    counted = f"{name}@{examples}"
    return counted if counted in results["attacks"] else name


def attack_warnings(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the attacks of a results file had to say, a sentence each, with their names."""
    return [
        f"{name}: {warning}"
        for name, settings in attacks.items()
        for warning in settings.get("warnings", [])
    ]


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[name]: value for name, value in values.items()}


def _routing(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], names: Mapping[str, str], keep_old: bool
) -> dict[str, Any]:
    """Load and entropy of the clean images, with the agreement under all attacks."""
    old = old or {}
    agreement = old.get("agreement", {}) | _renamed(new["agreement"], names)
    merged = {**(old if keep_old else new), "agreement": agreement}
    if "layers" in new:
        merged["layers"] = _routing(old.get("layers"), new["layers"], names, keep_old)
    return merged


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


def git_commit(source: Path = Path(__file__).parents[2]) -> str | None:
    """The commit of a source tree, ``-dirty`` if tracked files differ.

    Args:
        source: the tree; by default this package's.

    Returns:
        None if the tree is no checkout, such as an installed package in somebody else's.
    """
    source = source.resolve()

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
        UserError: if the file is damaged, or its parts are not what an evaluation writes.
    """
    found = read_json(workdir / RESULTS)
    if found is not None and not _is_whole(found):
        raise UserError(
            f"{workdir / RESULTS} is damaged: it is not what an evaluation writes; move it away "
            "and give the command again"
        )
    return found


def _is_whole(results: Mapping[str, Any]) -> bool:
    """Whether what later evaluations build on is of the right kinds."""
    groups = [results.get(name, {}) for name in ("attacks", "robust_accuracy", "images_per_second")]
    routing = results.get("routing") or {}
    if not all(isinstance(x, dict) for x in (*groups, routing, results.get("evaluated", {}))):
        return False
    attacks, accuracies, _ = groups
    numbers = [*accuracies.values(), results.get("standard_accuracy", 0.0)]
    numbers += [x.get("examples", 0) if isinstance(x, dict) else None for x in attacks.values()]
    return (
        all(isinstance(x, int | float) and math.isfinite(x) for x in numbers)
        and isinstance(routing.get("agreement", {}), dict)
        and isinstance(routing.get("layers", {}), dict)
    )
