"""The rows of a comparison: what a config's table says of them, and the run that each one is.

Every row of every seed is an ordinary run directory, ``<row>/seed<k>``. A row differs from the
comparison's ``config.run`` in its ``changes`` and in nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax import defaults
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.explanation import explained_attack
from advmoe_jax.evaluation.wanted import applicable, parse_attacks
from advmoe_jax.runs import build
from advmoe_jax.training import methods
from advmoe_jax.types import Tree


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        title: as the table has it.
        about: what is done, in a few words.
        changes: values of ``config.run`` that are this row's own, by dotted name.
        builds_on: the row whose run of the same seed this one starts from; empty: none.
        style: how figures draw it, in matplotlib's words.
        judged: whether the table says in words how it stands to the reference.
    """

    title: str
    about: str
    changes: Mapping[str, Any]
    builds_on: str
    style: Mapping[str, Any]
    judged: bool


# What every row has in common, whatever its changes: seeds, images, and how all are attacked.
_SHARED = (
    "seed",
    *(f"data.{name}" for name in ("source", "path", "image_size", "stream", "train_examples")),
    *(f"data.{name}" for name in ("train_split", "test_split", "validation_fraction")),
    *("attack.norm", "attack.epsilon", "evaluation.step_size", "evaluation.restarts"),
)
EVERY_PART = ("experts", "router", "exits")  # that attacks may need
# Of a row in a config; the contents of the two groups are the user's.
_FIELDS = {"title": str, "about": str, "builds_on": str, "judged": bool}
_GROUPS = ("changes", "style")


def schema() -> config_lib.Schema:
    """The values of a comparison that a command line may name."""
    return {**config_lib.schema_of(defaults.comparison()), "run": config_lib.any_schema()}


def check(config: ConfigDict) -> None:
    """Raises UserError unless every value of the comparison can be used."""
    for part in ("run", "table"):
        if not isinstance(config.get(part), ConfigDict):
            raise UserError(
                f"the config is of no comparison, it has no group {part!r}: start from one of "
                "configs/compare_*.py"
            )
    shared = ConfigDict({k: v for k, v in config.items() if k not in ("run", "table")})
    config_lib.check(shared, config_lib.schema_of(defaults.comparison()))
    config_lib.check(config.run, inside="run.")
    if config.num_seeds < 1:
        raise UserError(f"config.num_seeds={config.num_seeds} must be at least 1")
    if seeds(config)[-1] > config_lib.MOST_SEED:
        raise UserError(
            f"config.run.seed={config.run.seed} and config.num_seeds={config.num_seeds}: seeds end "
            f"at {config_lib.MOST_SEED}"
        )
    for name in ("examples", "strong_examples", "explained_examples"):
        if config[name] < 0:
            raise UserError(f"config.{name}={config[name]} must not be negative; 0 means all")
    if not 0 <= config.sparse_keep <= 1:
        raise UserError(f"config.sparse_keep={config.sparse_keep} must lie in [0, 1]")
    methods.method(config.run.method)
    if config.run.model.num_experts < 2 or config.run.model.get("keep", 1) != 1:
        raise UserError(
            "config.run.model is that of the mixture: it needs num_experts=2 or more and keep=1; "
            "the rows of dense and Sparse networks follow from it"
        )
    rows = table(config)
    if config.reference not in rows:
        raise UserError(f"config.reference={config.reference!r} is no row of the table")
    wanted = names(config)
    for name in wanted:
        config_lib.check(config_lib.with_changes(config.run, rows[name].changes), inside="run.")
        needed = rows[name].builds_on
        if needed and needed not in wanted:
            raise UserError(f"row {name!r} starts from the runs of {needed!r}: add it to rows")
    if not attacks(config, EVERY_PART):
        raise UserError("config.attacks names no attack: name one, such as pgd50")
    explained_attack(config.explained_attack, build.protocol(config.run), ("backbone",))


def table(config: ConfigDict) -> dict[str, Row]:
    """All rows that the config knows, by name.

    Raises:
        UserError: if one is not what a row must be, or changes a value that does not exist.
    """
    run = config_lib.family_schema(config.run.family)
    rows = {}
    for name, values in config.table.items():
        if not isinstance(values, ConfigDict):
            raise UserError(f"config.table.{name} must be a group of values, not {values!r}")
        for field, kind in _FIELDS.items():
            if not isinstance(values.get(field), kind):
                raise UserError(f"config.table.{name}.{field} must be a {kind.__name__}")
        for group in _GROUPS:
            if not isinstance(values.get(group, ConfigDict()), ConfigDict):
                raise UserError(f"config.table.{name}.{group} must be a group of values")
        changes, style = (values.get(group, ConfigDict()) for group in _GROUPS)
        changes = config_lib.flatten(changes)
        for changed in changes:
            config_lib.check_name(changed, run)
            if changed in _SHARED:
                raise UserError(
                    f"config.table.{name}.changes names {changed}, which all rows have in common: "
                    f"set config.run.{changed}"
                )
        rows[name] = Row(
            values.title, values.about, changes, values.builds_on, style.to_dict(), values.judged
        )
    return rows


def names(config: ConfigDict) -> list[str]:
    """The rows that are wanted, in the order in which they are run: no row before its own start.

    Raises:
        UserError: if one is unknown, or starts from itself.
    """
    rows = table(config)
    wanted = [name.strip() for name in config.rows.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in rows]:
        raise UserError(f"row {unknown[0]!r} is unknown; choose from {', '.join(rows)}")
    if not wanted:
        raise UserError(f"config.rows names no row; choose from {', '.join(rows)}")
    ordered: list[str] = []
    for name in wanted:
        chain = reversed([name, *_starts(rows, name)])
        ordered += [x for x in chain if x in wanted and x not in ordered]
    return ordered


def _starts(rows: Mapping[str, Row], name: str) -> list[str]:
    """The row that this one builds on, the row that that one builds on, and so on."""
    chain: list[str] = []
    needed = rows[name].builds_on
    while needed in rows:
        if needed == name or needed in chain:
            raise UserError(f"config.table.{name}.builds_on leads back to {needed!r}")
        chain.append(needed)
        needed = rows[needed].builds_on
    return chain


def seeds(config: ConfigDict) -> range:
    """The seeds of the runs."""
    return range(config.run.seed, config.run.seed + config.num_seeds)


def attacks(config: ConfigDict, parts: tuple[str, ...], which: str = "") -> list[str]:
    """The attacks of a row; those on a part that its network does not have are left out.

    Args:
        config: of the comparison.
        parts: of the row's networks.
        which: ``attacks`` or ``strong_attacks``; empty: both.

    Raises:
        UserError: if a name is unknown.
    """
    text = ",".join(config[name] for name in ([which] if which else ["attacks", "strong_attacks"]))
    every = [name.strip() for name in text.split(",") if name.strip() not in ("", "clean")]
    protocol = build.protocol(config.run)
    parse_attacks(",".join(every), protocol, EVERY_PART)
    kept = applicable(",".join(every), parts)
    return kept.split(",") if kept else []


def parts(config: ConfigDict, name: str) -> tuple[str, ...]:
    """The parts of a row's networks."""
    run = config_lib.with_changes(config.run, table(config)[name].changes)
    return build.architecture(run).parts


def is_sparse(config: ConfigDict, name: str) -> bool:
    """Whether the row's networks keep a share of their channels."""
    method = table(config)[name].changes.get("method", config.run.method)
    start = methods.method(method).start
    return start is not None and "keep" in start.trained_as


def run_config(
    config: ConfigDict, name: str, seed: int, keep: float | None, root: Path
) -> ConfigDict:
    """The whole config of one run of the comparison.

    Args:
        config: of the comparison.
        name: of the row.
        seed: of the run.
        keep: share of channels of a Sparse row; None will do for others.
        root: directory of the comparison.
    """
    row = table(config)[name]
    changes: Tree = {"seed": seed, **row.changes}
    start = methods.method(changes.get("method", config.run.method)).start
    if row.builds_on:
        path = start.run if start else "start.run"
        changes[path] = str(run_directory(root, row.builds_on, seed))
    if start:
        changes |= {f"model.{value}": keep for value in start.trained_as if value == "keep"}
    run = config_lib.with_changes(config.run, changes)
    applicable = attacks(config, build.architecture(run).parts)
    run = config_lib.with_changes(run, {"evaluation.attacks": ",".join(applicable)})
    config_lib.check(run, inside="run.")
    return run


def run_directory(root: Path, name: str, seed: int) -> Path:
    """Where a run of the comparison lies."""
    return root / name / f"seed{seed}"


def asked(config: ConfigDict, name: str, seed: int) -> Tree:
    """All that a run's numbers follow from, in JSON; wherever its data lie."""
    content = json.loads(config.to_json())
    content["run"] |= {"seed": seed}
    content["run"]["data"]["path"] = Path(config.run.data.path).name
    for other in ("rows", "num_seeds", "table", "reference", "remark"):
        del content[other]
    found = table(config)
    # A tuple, such as of exits, is a list in JSON.
    changes = {x: json.loads(json.dumps(dict(found[x].changes))) for x in found}
    content["row"] = changes[name]
    if starts := _starts(found, name):
        content["starts"] = [changes[start] for start in starts]
    return content
