"""The attacks on networks with side exits that an evaluation can name.

``main``, ``exit<i>`` (side exits from 1), ``average`` and ``max_average`` are PGD, as published,
and do not know the thresholds; ``_apgd`` behind a name is APGD, whose every point the dynamic
network judges (``max_average_apgd``: an image is robust if no exit's attack succeeds). ``taken``,
``steer`` and ``slow_down`` know the thresholds. ``exit_suite`` is the minimum over all that are
judged so, per image; ``exit_joint`` is on exits and router together, and part of the suite of a
mixture.
"""

from collections.abc import Callable
from typing import Any

from advmoe_jax.attacks import autoattack, pgd
from advmoe_jax.attacks.exiting import (
    average_steps,
    exit_steps,
    joint_steps,
    slow_down,
    steer_steps,
    taken_steps,
)
from advmoe_jax.attacks.exits import on_exits
from advmoe_jax.attacks.stepwise import Stepwise
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import views
from advmoe_jax.evaluation.records import NamedAttack, Record

MOST_SIDE_EXITS = 49  # of any backbone: ResNet-152's


def _pgd(attack: NamedAttack) -> dict[str, Any]:
    return {
        "num_steps": attack.num_steps,
        "step_size": attack.step_size,
        "restarts": attack.restarts,
    }


def _apgd(attack: NamedAttack) -> dict[str, Any]:
    return {"num_steps": attack.num_steps, "restarts": attack.restarts}


def _blind(aim: str, about: str, **fields: Any) -> Record:
    """PGD, as published."""
    return Record(
        lambda a: on_exits(aim, lambda loss: pgd(a.threat, loss=loss, **_pgd(a))),
        _pgd,
        steps=20,
        is_counted=True,
        view=views.exits,
        needs="exits",
        about=about,
        **fields,
    )


def _judged(
    parts: Callable[[NamedAttack], dict[str, Stepwise]], about: str, **fields: Any
) -> Record:
    """APGD, judged by the dynamic network."""
    return Record(
        lambda a: autoattack(a.threat, "custom", attacks=parts(a)),
        _apgd,
        steps=100,
        is_counted=True,
        view=views.exiting,
        needs="exits",
        is_ensemble=True,
        about=about,
        **fields,
    )


def _single(number: int, name: str) -> Callable[[NamedAttack], dict[str, Stepwise]]:
    return lambda a: {name: exit_steps(a.threat, number, **_apgd(a))}


def _every_exit(attack: NamedAttack) -> dict[str, Stepwise]:
    parts = {}
    for number in range(attack.num_exits):
        name = f"exit{number + 1}" if number < attack.num_exits - 1 else "main"
        parts[name] = exit_steps(attack.threat, number, **_apgd(attack))
    return parts


def _average(attack: NamedAttack) -> dict[str, Stepwise]:
    return {"average": average_steps(attack.threat, **_apgd(attack))}


def _taken(attack: NamedAttack) -> dict[str, Stepwise]:
    return {"taken": taken_steps(attack.threat, **_apgd(attack))}


def _steer(attack: NamedAttack) -> dict[str, Stepwise]:
    steps = steer_steps(attack.threat, attack.num_exits, num_steps=attack.num_steps)
    return {"steer": steps}


def _joint(attack: NamedAttack) -> dict[str, Stepwise]:
    return {"exit_joint": joint_steps(attack.threat, **_apgd(attack))}


def _suite(attack: NamedAttack) -> dict[str, Stepwise]:
    return _taken(attack) | _average(attack) | _every_exit(attack) | _steer(attack)


def _side_exit(number: int) -> dict[str, Record]:
    """The attacks on one side exit."""
    name = f"exit{number}"
    return {
        name: _blind(name, "PGD on one side exit, as published", side_exit=number),
        f"{name}_apgd": _judged(
            _single(number - 1, name),
            "APGD on one side exit, judged by the dynamic network",
            side_exit=number,
        ),
    }


EXIT_ATTACKS: dict[str, Record] = {
    "main": _blind("main", "PGD on the main exit, as published"),
    "average": _blind("average", "PGD on the mean loss of all exits, as published"),
    "max_average": _blind(
        "max_average", "of every exit's PGD images the one that all exits lose most on"
    ),
    "main_apgd": _judged(_single(-1, "main"), "APGD on the main exit, judged dynamically"),
    "average_apgd": _judged(_average, "APGD on the mean loss of all exits, judged dynamically"),
    "max_average_apgd": _judged(_every_exit, "APGD on every exit, judged dynamically"),
    "taken": _judged(_taken, "APGD on the exit that is taken at the moment"),
    "steer": _judged(_steer, "APGD towards each exit: leave there, and be wrong there"),
    "exit_joint": _judged(_joint, "APGD on exits and router together", needs_route=True),
    "exit_suite": _judged(_suite, "minimum over taken, average, every exit and steer"),
    "routed_exit_suite": _judged(
        lambda a: _suite(a) | _joint(a), "exit_suite and exit_joint", needs_route=True
    ),
    "slow_down": Record(
        lambda a: slow_down(a.threat, num_steps=a.num_steps),
        lambda a: {"num_steps": a.num_steps},
        steps=100,
        is_counted=True,
        view=views.exiting,
        needs="exits",
        about="raises the entropies, so that images leave late",
    ),
    **{
        name: record
        for number in range(1, MOST_SIDE_EXITS + 1)
        for name, record in _side_exit(number).items()
    },
}


def check_exits(attacks: list[NamedAttack], num_exits: int, is_moe: bool) -> None:
    """Raises UserError if an attack is on an exit, or on a router, that the network does not have.

    Args:
        attacks: to check.
        num_exits: of the network, the main one counted.
        is_moe: whether it has a router.
    """
    for attack in attacks:
        record = attack.record
        if record.side_exit >= num_exits and record.side_exit:
            raise UserError(
                f"attack {attack.name!r} is on side exit {record.side_exit}; the network has "
                f"{num_exits - 1}"
            )
        if record.needs_route and not is_moe:
            raise UserError(f"attack {attack.name!r} is on a router; the network has none")
