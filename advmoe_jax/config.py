"""What a config holds, and what is said when it does not.

A config file returns a ``ConfigDict`` with every value that a run uses; ``SCHEMA`` lists their
names and types. Values that only one module understands (the name of a network, say) are checked
by that module.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax.errors import UserError

_OPTIMIZER = {
    "name": str,
    "learning_rate": float,
    "momentum": float,
    "weight_decay": float,
    "schedule": str,
    "warmup_epochs": float,
    "clip_norm": float,
}

SCHEMA: dict[str, Any] = {
    "seed": int,
    "method": str,
    "num_epochs": int,
    "batch_size": int,
    "microbatches": int,
    "num_devices": int,
    "ema_decay": float,
    "patience": int,
    "model": {
        "name": str,
        "num_experts": int,
        "ratio": float,
        "width": int,
        "keep": float,
        "raw_widening": bool,
        "top_k": int,
        "gate": str,
        "dispatch": str,
        "block_size": int,
        "remat": bool,
        "dtype": str,
        "param_dtype": str,
        "mean": tuple,
        "std": tuple,
        "router": {"scope": str, "resolution": int, "width": int, "blocks": int},
    },
    "data": {
        "source": str,
        "path": str,
        "image_size": int,
        "train_split": str,
        "test_split": str,
        "train_examples": int,
        "validation_fraction": float,
        "crop_padding": int,
        "flip": bool,
        "stream": bool,
        "cutmix": float,
        "cutmix_alpha": float,
        "extra_path": str,
        "extra_share": float,
    },
    "attack": {
        "norm": str,
        "epsilon": float,
        "num_steps": int,
        "step_size": float,
    },
    "pruning": {"dense_run": str, "epochs": int},
    "start": {"run": str, "frozen": str},
    "loss": {
        "beta": float,
        "alpha": float,
        "router_objective": str,
        "label_smoothing": float,
        "awp": float,
        "awp_warmup_epochs": float,
    },
    "balance": {
        "importance": float,
        "load": float,
        "switch": float,
        "entropy": float,
        "noise": float,
        "warmup_epochs": float,
    },
    "optimizer": {"experts": _OPTIMIZER, "router": _OPTIMIZER},
    "evaluation": {
        "attacks": str,
        "step_size": float,
        "restarts": int,
        "batch_size": int,
        "validation_steps": int,
    },
    "checkpoint": {"keep": int},
}

# Values that runs of earlier versions had not, and what they did: their directories stay readable.
_ADDED = {
    "ema_decay": 0.0,
    "patience": 0,
    "start": {"run": "", "frozen": ""},
    "data": {
        "stream": False,
        "cutmix": 0.0,
        "cutmix_alpha": 1.0,
        "extra_path": "",
        "extra_share": 0.0,
    },
    "loss": {"label_smoothing": 0.0, "awp": 0.0, "awp_warmup_epochs": 0.0},
    "balance": {
        "importance": 0.0,
        "load": 0.0,
        "switch": 0.0,
        "entropy": 0.0,
        "noise": 0.0,
        "warmup_epochs": 0.0,
    },
}

_POSITIVE = (
    "num_epochs",
    "microbatches",
    "attack.num_steps",
    "evaluation.restarts",
    "evaluation.batch_size",
    "evaluation.validation_steps",
    "checkpoint.keep",
)
_NOT_NEGATIVE = (
    "seed",
    "num_devices",
    "data.crop_padding",
    "data.image_size",
    "data.train_examples",
    "pruning.epochs",
    "patience",
    "loss.awp",
    "loss.awp_warmup_epochs",
    "balance.importance",
    "balance.load",
    "balance.switch",
    "balance.entropy",
    "balance.noise",
    "balance.warmup_epochs",
)
# Shares: from 0 to 1, the first without 1 itself.
_BELOW_ONE = ("ema_decay", "loss.label_smoothing", "data.extra_share")
_AT_MOST_ONE = ("data.cutmix",)
_PATHS = ("data.path", "data.extra_path", "pruning.dense_run", "start.run")


def names(schema: Mapping[str, Any] = SCHEMA, prefix: str = "") -> Iterator[str]:
    """Every name of a value in the schema, dotted, such as ``model.router.width``."""
    for name, kind in schema.items():
        if isinstance(kind, Mapping):
            yield from names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def check_name(name: str, schema: Mapping[str, Any] = SCHEMA) -> None:
    """Raises UserError with the nearest valid name if ``name`` (dotted) is not in the schema."""
    valid = list(names(schema))
    if name in valid:
        return
    if any(v.startswith(name + ".") for v in valid):
        inside = ", ".join(v for v in valid if v.startswith(name + "."))
        raise UserError(f"config.{name} is a group; set one of its values: {inside}")
    raise UserError(f"config.{name} does not exist; did you mean config.{_nearest(name, valid)}?")


def check(config: ConfigDict, schema: Mapping[str, Any] = SCHEMA) -> None:
    """Raises UserError unless the config has exactly the schema's names, with values of its types.

    Integers are accepted where a float is expected, and lists where a tuple is. The config of a run
    may be part of another one, under ``run``.
    """
    given = dict(_flatten(config))
    for name in given:
        check_name(name, schema)
    for name in names(schema):
        if name not in given:
            raise UserError(f"the config has no value for {name}; a config shows every value")
        kind, value = _type_of(name, schema), given[name]
        accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(
                f"config.{name}={value!r} must be of type {kind.__name__}, "
                f"not {type(value).__name__}"
            )
        numbers = {float: [value], tuple: value}.get(kind, [])
        if not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
            raise UserError(f"config.{name}={value!r} must be finite numbers")
    inside = "run." if "run" in schema else ""
    for name in _POSITIVE:
        if given[inside + name] < 1:
            raise UserError(f"config.{inside}{name}={given[inside + name]} must be at least 1")
    for name in _NOT_NEGATIVE:
        if given[inside + name] < 0:
            raise UserError(f"config.{inside}{name}={given[inside + name]} must not be negative")
    for name in (*_BELOW_ONE, *_AT_MOST_ONE):
        value, closed = given[inside + name], name in _AT_MOST_ONE
        if not (0 <= value < 1 or (closed and value == 1)):
            raise UserError(
                f"config.{inside}{name}={value} must lie in [0, 1{']' if closed else ')'}"
            )
    if (alpha := given[inside + "data.cutmix_alpha"]) <= 0:
        raise UserError(f"config.{inside}data.cutmix_alpha={alpha} must be positive")


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, whole or not at all."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(config.to_json(indent=2) + "\n")
    partial.replace(path)


def load(path: Path) -> ConfigDict:
    """Reads what ``save`` wrote, also before some values existed: they get what was done then.

    Raises:
        UserError: if the file is missing, damaged, or not a valid config.
    """
    try:
        config = ConfigDict(_with_defaults(json.loads(path.read_text()), _ADDED))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {path.parent} holds no run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path} is damaged: it is not a config in JSON; move it away and give the training "
            "command again"
        ) from None
    check(config)
    return config


def _with_defaults(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, with those of ``defaults`` that are missing."""
    missing = {name: item for name, item in defaults.items() if name not in values}
    inside = {
        name: _with_defaults(values[name], item)
        for name, item in defaults.items()
        if isinstance(item, Mapping) and isinstance(values.get(name), dict)
    }
    return values | missing | inside


def difference(config: ConfigDict, other: ConfigDict) -> str | None:
    """The first name in which two valid configs differ, or None.

    Paths that end in the same name do not: on another machine things lie elsewhere. Nor do the
    attacks to evaluate: more of them may be wanted later.
    """
    ours, theirs = (json.loads(c.to_json()) for c in (config, other))
    ours, theirs = dict(_flatten(ours)), dict(_flatten(theirs))
    for name in _PATHS:
        ours[name], theirs[name] = Path(ours[name]).name, Path(theirs[name]).name
    del ours["evaluation.attacks"]
    return next((name for name in ours if ours[name] != theirs[name]), None)


def value(config: ConfigDict, name: str) -> Any:
    """The value of a dotted name."""
    return dict(_flatten(config))[name]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in tree.items():
        if isinstance(item, Mapping | ConfigDict):
            yield from _flatten(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def _type_of(name: str, schema: Mapping[str, Any]) -> type:
    kind: Any = schema
    for part in name.split("."):
        kind = kind[part]
    return kind


def _nearest(name: str, valid: list[str]) -> str:
    by_last = {v.split(".")[-1]: v for v in valid}
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    last = difflib.get_close_matches(name.split(".")[-1], by_last, n=1, cutoff=0.5)
    if close:
        return close[0]
    return by_last[last[0]] if last else valid[0]
