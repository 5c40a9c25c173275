"""What a user's words ask for: lists of attacks, another threat model."""

import math
import re
from collections.abc import Sequence

from advmoe_jax.attacks import Threat, make_threat
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.named_attacks import ATTACKS, named_attack, parse_name
from advmoe_jax.evaluation.records import NamedAttack, Protocol


def parse_attacks(
    names: str, protocol: Protocol, parts: Sequence[str], threat: Threat | None = None
) -> list[NamedAttack]:
    """The attacks of a comma-separated list, ``clean`` first whether named or not.

    Args:
        names: such as ``clean,fgsm,pgd20,autoattack,moe``.
        protocol: what they share.
        parts: of the network.
        threat: another threat model than the protocol's; see ``other_threat``.

    Raises:
        UserError: if a name is unknown, or attacks a part that is not there.
    """
    unique = list(dict.fromkeys(["clean", *_split(names)]))
    return [named_attack(name, protocol, parts, threat) for name in unique]


def applicable(names: str, parts: Sequence[str]) -> str:
    """Those of a comma-separated list whose attacks a network with such parts can have."""

    def applies(name: str) -> bool:
        needed = ATTACKS[parse_name(name)[0]].needs
        return not needed or needed in parts

    return ",".join(filter(applies, _split(names)))


def other_threat(norm: str, epsilon: str, usual: Threat) -> Threat | None:
    """The threat model of ``--norm`` and ``--epsilon``; None if both are empty.

    Args:
        norm: linf, l2 or l1, or empty for the usual one.
        epsilon: a number or a fraction such as ``8/255``, or empty for the usual one.
        usual: the threat model of the run.

    Raises:
        UserError: if there is no such threat model.
    """
    if not norm and not epsilon:
        return None
    if not epsilon and norm != usual.norm:
        raise UserError(
            f"--norm={norm} needs an --epsilon: the config's {usual.epsilon:g} is a radius "
            f"in {usual.norm}"
        )
    radius = number(epsilon) if epsilon else usual.epsilon
    if radius is None:
        raise UserError(f"--epsilon={epsilon} is no radius: give a number such as 0.031 or 8/255")
    if (norm or usual.norm) == "linf" and radius > 1:
        raise UserError(
            f"--epsilon={epsilon} is wider than the pixels' range, [0, 1]: give a number such as "
            "8/255"
        )
    try:
        return make_threat(norm or usual.norm, radius)
    except ValueError as error:
        raise UserError(f"--norm and --epsilon: {error}") from None


def number(text: str) -> float | None:
    """The finite number that a decimal or a fraction such as ``8/255`` says; None if none."""
    part = r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)\s*"
    match = re.fullmatch(f"{part}(?:/{part})?", text)
    if not match or (match[2] and float(match[2]) == 0):
        return None
    value = float(match[1]) / float(match[2] or 1)
    return value if math.isfinite(value) else None


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
