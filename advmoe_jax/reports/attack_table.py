"""The attacks that an evaluation can name, as a table for people who choose."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from advmoe_jax.attacks import make_threat
from advmoe_jax.attacks.constraints import NORMS
from advmoe_jax.evaluation.named_attacks import ATTACKS
from advmoe_jax.evaluation.records import NamedAttack, Record

_SOME_EPSILON = 0.1
_NAME_WIDTH = max(map(len, ATTACKS)) + len("[N]")


def print_attacks(console: Console) -> None:
    """Prints a line for each attack by what it needs: name, usual steps, norms, what it does.

    Of the attacks on side exits those on the first one stand for all.
    """
    groups: dict[str, dict[str, Record]] = {}
    for name, record in ATTACKS.items():
        if record.side_exit <= 1:
            groups.setdefault(_needs(record), {})[name] = record
    for needs, records in groups.items():
        console.print(f"\n{needs}:", highlight=False)
        console.print(_table(records))
    console.print(
        "\nN is a number of steps: pgd20, cw200, exit1_40. exit1 stands for exit2, exit3 ... too.",
        highlight=False,
    )


def _needs(record: Record) -> str:
    """What a network must have for the attack, as a heading."""
    if record.needs == "exits":
        return "For networks with exits" + (" and a router" if record.needs_route else "")
    return "For networks with a router" if record.needs else "For any network"


def _table(records: Mapping[str, Record]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("name", width=_NAME_WIDTH)
    table.add_column("steps", justify="right", width=5)
    table.add_column("norms", width=7)
    table.add_column("what it does")
    for name, record in records.items():
        cells = _name(name, record), _steps(record), _norms(record), record.about
        table.add_row(*map(Text, cells))
    return table


def _name(name: str, record: Record) -> str:
    """The name, with N where it must end in a number, and [N] where it may."""
    if not record.is_counted:
        return name
    if record.steps is None:
        return f"{name}N"
    return f"{name}[{'_' if record.side_exit else ''}N]"


def _steps(record: Record) -> str:
    return f"{record.steps:,}" if record.steps else ""


def _norms(record: Record) -> str:
    """The norms in which the attack can be made; a dash if it perturbs nothing."""
    threats = [make_threat(norm, _SOME_EPSILON) for norm in NORMS]
    attacks = [NamedAttack("", record, x, record.steps or 1, _SOME_EPSILON, 1) for x in threats]
    found = [a.threat.norm for a in attacks if a.settings and _can_be(a)]
    return "all" if len(found) == len(NORMS) else " ".join(found) or "-"


def _can_be(attack: NamedAttack) -> bool:
    try:
        attack.check()
    except ValueError:
        return False
    return True
