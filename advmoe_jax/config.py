"""What a config must be, and what is said when it is not.

A config holds every value that a run uses: those of its family's defaults (``defaults``), of their
types. Values that only one module understands (the name of a network, say) are checked by that
module.
"""

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax import defaults, files, storage
from advmoe_jax.errors import UserError

# A nested dict of types, by the names of the values.
Schema = Mapping[str, Any]

_POSITIVE = (
    "expert_shards",
    "num_epochs",
    "microbatches",
    "attack.num_steps",
    "evaluation.restarts",
    "evaluation.batch_size",
    "evaluation.validation_steps",
    "checkpoint.keep",
)
_NOT_NEGATIVE = (
    "num_devices",
    "data.crop_padding",
    "data.image_size",
    "data.workers",
    "data.train_examples",
    "data.mixup",
    "pruning.epochs",
    "patience",
    "evaluation.show_every",
    "loss.beta",
    "loss.alpha",
    "loss.awp",
    "loss.consistency",
    "loss.awp_warmup_epochs",
    "balance.importance",
    "balance.load",
    "balance.switch",
    "balance.entropy",
    "balance.noise",
    "balance.warmup_epochs",
)
MOST = 2**31 - 1  # of integers: positions are 32 bits wide
MOST_SEED = 2**32 - 1  # seeds that are 2^32 apart give the same key
# Shares: from 0 to 1, the first without 1 itself.
_BELOW_ONE = (
    "ema_decay",
    "loss.label_smoothing",
    "data.extra_share",
    "optimizer.experts.momentum",
    "optimizer.router.momentum",
)
_AT_MOST_ONE = ("data.cutmix", "balance.random_share", "balance.shared_steps")
PATHS = ("data.path", "data.extra_path", "pruning.dense_run", "start.run")


def schema_of(config: Mapping[str, Any]) -> Schema:
    """The types of a config's values."""
    return {
        name: schema_of(value) if isinstance(value, Mapping | ConfigDict) else type(value)
        for name, value in config.items()
    }


def family_schema(family: Any) -> Schema:
    """The schema of a family of models.

    Raises:
        UserError: if there is no such family.
    """
    if family is None:
        raise UserError("the config has no value for family; start from advmoe_jax.defaults")
    if not isinstance(family, str) or family not in defaults.FAMILIES:
        raise UserError(
            f"config.family={family!r} is unknown; choose one of {', '.join(defaults.FAMILIES)}"
        )
    return schema_of(defaults.FAMILIES[family]())


def any_schema() -> Schema:
    """The values of all families: what a command line may name before its config is read."""
    every: dict[str, Any] = {}
    for family in defaults.FAMILIES:
        every = _merged(every, family_schema(family))
    return every


def _merged(one: Schema, other: Schema) -> dict[str, Any]:
    both = {
        name: _merged(one[name], other[name])
        for name in one.keys() & other.keys()
        if isinstance(one[name], Mapping)
    }
    return {**one, **other, **both}


def names(schema: Schema, prefix: str = "") -> Iterator[str]:
    """Every name of a value in the schema, dotted, such as ``model.router.width``."""
    for name, kind in schema.items():
        if isinstance(kind, Mapping):
            yield from names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def check_name(name: str, schema: Schema) -> None:
    """Raises UserError with the nearest valid name if ``name`` (dotted) is not in the schema."""
    valid = list(names(schema))
    if name in valid:
        return
    if any(v.startswith(name + ".") for v in valid):
        inside = ", ".join(v for v in valid if v.startswith(name + "."))
        raise UserError(f"config.{name} is a group; set one of its values: {inside}")
    raise UserError(f"config.{name} does not exist; did you mean config.{_nearest(name, valid)}?")


def check(config: ConfigDict, schema: Schema | None = None, inside: str = "") -> None:
    """Raises UserError unless the config has exactly the schema's names, with values of its types.

    Integers are accepted where a float is expected, and lists where a tuple is.

    Args:
        config: to check.
        schema: what it must be; None: that of a run of its family, whose values' ranges are
            checked too.
        inside: where the config stands in another one, such as ``run.``, for messages.
    """
    of_run = schema is None
    given = dict(_flatten(config))
    schema = family_schema(given.get("family")) if schema is None else schema
    for name in given:
        check_name(name, schema)
    for name in names(schema):
        if name not in given:
            raise UserError(
                f"the config has no value for {inside}{name}; start from advmoe_jax.defaults"
            )
        _check_type(inside + name, given[name], type_of(name, schema))
    if of_run:
        _check_ranges(given, inside)


def _check_type(name: str, value: Any, kind: type) -> None:
    accepted = {float: (float, int), tuple: (tuple, list)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(
            f"config.{name}={value!r} must be of type {kind.__name__}, not {type(value).__name__}"
        )
    numbers = {float: [value], tuple: value}.get(kind, [])
    if not all(isinstance(x, float | int) and math.isfinite(x) for x in numbers):
        raise UserError(f"config.{name}={value!r} must be finite numbers")


def _check_ranges(given: Mapping[str, Any], inside: str) -> None:
    for name in given.keys() & set(_POSITIVE):
        if given[name] < 1:
            raise UserError(f"config.{inside}{name}={given[name]} must be at least 1")
    for name in given.keys() & set(_NOT_NEGATIVE):
        if given[name] < 0:
            raise UserError(f"config.{inside}{name}={given[name]} must not be negative")
    for name, value in given.items():
        if isinstance(value, int) and name != "seed" and abs(value) > MOST:
            raise UserError(f"config.{inside}{name}={value} is beyond what is counted here, {MOST}")
    if not 0 <= given["seed"] <= MOST_SEED:
        raise UserError(f"config.{inside}seed={given['seed']} must lie in 0 to {MOST_SEED}")
    for name in given.keys() & {*_BELOW_ONE, *_AT_MOST_ONE}:
        value, closed = given[name], name in _AT_MOST_ONE
        if not (0 <= value < 1 or (closed and value == 1)):
            raise UserError(
                f"config.{inside}{name}={value} must lie in [0, 1{']' if closed else ')'}"
            )
    if given.get("attack.norm") == "linf" and given["attack.epsilon"] > 1:
        raise UserError(
            f"config.{inside}attack.epsilon={given['attack.epsilon']} is wider than the pixels' "
            "range, [0, 1]: give a number such as 8/255"
        )
    for name in (x for x in given if x.endswith("warmup_epochs")):
        if given[name] > given["num_epochs"]:
            raise UserError(
                f"config.{inside}{name}={given[name]} is longer than the run, of "
                f"num_epochs={given['num_epochs']}"
            )
    # A comparison's rows name the run that they start from later.
    if given.get("start.frozen") and not given["start.run"] and not inside:
        raise UserError(
            f"config.start.frozen={given['start.frozen']!r} needs a run to start from: "
            "set start.run"
        )
    if not 0 < (area := given.get("data.crop_area", 1)) <= 1:
        raise UserError(f"config.{inside}data.crop_area={area} must lie in (0, 1]")
    share = given.get("data.validation_fraction", 0.5)
    if not 0 < share < 1:
        raise UserError(
            f"config.{inside}data.validation_fraction={share} must lie between 0 and 1: the best "
            "checkpoint is chosen by the images that it sets aside"
        )
    if (alpha := given.get("data.cutmix_alpha", 1)) <= 0:
        raise UserError(f"config.{inside}data.cutmix_alpha={alpha} must be positive")


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, whole or not at all."""
    files.write_text(path, config.to_json(indent=2) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads what ``save`` wrote.

    Raises:
        UserError: if the file is missing, damaged, or not a valid config.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: {path.parent} holds no run")
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist: {path.parent} holds no run") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {storage.reason(error)}") from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path} is damaged: it is not a config in JSON; move it away and give the training "
            "command again"
        ) from None
    check(config)
    return config


def difference(config: ConfigDict, other: ConfigDict) -> str | None:
    """The first name in which two valid configs differ, or None.

    Paths that end in the same name do not: on another machine things lie elsewhere. Nor do the
    attacks and thresholds to evaluate with, and what TensorBoard shows: others may be wanted later;
    nor how many processes decode the images, nor how many devices share the experts.
    """
    ours, theirs = _of_training(config), _of_training(other)
    return next((name for name in ours if ours[name] != theirs.get(name)), None)


def fingerprint(config: ConfigDict) -> str:
    """A digest that two valid configs share if and only if there is no ``difference``."""
    return files.fingerprint(sorted(_of_training(config).items()))


def _of_training(config: ConfigDict) -> dict[str, Any]:
    """The values that a trained network follows from; a number is a float, however written."""
    values = dict(_flatten(json.loads(config.to_json(), parse_int=float)))
    for name in values.keys() & set(PATHS):
        values[name] = Path(values[name]).name
    others = ("evaluation.attacks", "evaluation.thresholds", "evaluation.show_every")
    for name in (*others, "data.workers", "expert_shards"):
        values.pop(name, None)
    return values


def value(config: ConfigDict, name: str) -> Any:
    """The value of a dotted name."""
    return dict(_flatten(config)).get(name)


def with_changes(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values, given by dotted names."""
    copy = ConfigDict(config.to_dict())
    with copy.ignore_type():
        for name, changed in changes.items():
            *groups, last = name.split(".")
            group = copy
            for part in groups:
                group = group[part]
            group[last] = changed
    return copy


def completed(config: ConfigDict) -> ConfigDict:
    """A copy with the defaults of the values that its family has and the config does not.

    For what was written when there were fewer values: it was made as the defaults of those say.

    Raises:
        UserError: if there is no such family.
    """
    family_schema(config.get("family"))
    return ConfigDict(_filled(config.to_dict(), defaults.FAMILIES[config.family]().to_dict()))


def _filled(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _filled(given[name], usual[name])
        for name in given.keys() & usual.keys()
        if isinstance(given[name], Mapping) and isinstance(usual[name], Mapping)
    }
    return {**usual, **given, **both}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a nested config by their dotted names."""
    return dict(_flatten(tree))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in tree.items():
        if isinstance(item, Mapping | ConfigDict):
            yield from _flatten(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def type_of(name: str, schema: Schema) -> type:
    """The type of the value of a dotted name, which the schema has."""
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
