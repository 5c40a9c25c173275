"""When images leave a multi-exit network: thresholds of the exits' entropies, chosen in three ways.

A rule is a word of a config, as users write it:

- ``quota``: every exit, the main one too, gets the same share of the images; this is the published
  rule (Hu et al., ICLR 2020). ``quota:0.5,0.3,0.2``: these shares.
- ``macs:0.6``: images cost 0.6 of what all of them would cost at the main exit, in the mean.
- ``accuracy:0.005``: the fewest MACs at which the accuracy is at most 0.005 below that of the main
  exit. ``accuracy:0.005:pgd20``: the accuracy under that attack; MACs are those of clean images.
- ``given:0.5,0.8``: these thresholds, one for each side exit.
- ``never``: all images go to the main exit.

Rules two and three search the shares q (1 - q)^i of MSDNet (Huang et al., ICLR 2018, section 4): q
is one number, from which a share for every exit follows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from advmoe_jax.errors import UserError
from advmoe_jax.models.trunk import NEVER

Entropies = Float[np.ndarray, "images side_exits"]
Thresholds = Float[np.ndarray, " side_exits"]
RULES = ("quota", "macs", "accuracy", "given", "never")
_CANDIDATES = 200


class Rule(NamedTuple):
    """How thresholds are chosen.

    Attributes:
        kind: one of ``RULES``.
        values: what stands behind the first colon.
        attack: what the accuracy is under; empty: clean images.
        text: as the user wrote it.
    """

    kind: str
    values: tuple[float, ...]
    attack: str
    text: str


def parse_rule(text: str, num_exits: int) -> Rule:
    """The rule that a user's words say.

    Args:
        text: as above.
        num_exits: of the network, the main one counted.

    Raises:
        UserError: if there is no such rule, or it has another number of values than it needs.
    """
    kind, *rest = text.split(":")
    told = f"evaluation.thresholds={text!r}"
    if kind not in RULES or len(rest) > (2 if kind == "accuracy" else 1):
        raise UserError(f"{told} is no rule; choose one of {', '.join(RULES)}, see docs/rdi.md")
    try:
        values = tuple(float(word) for word in rest[0].split(",")) if rest else ()
    except ValueError:
        raise UserError(f"{told}: {rest[0]!r} is no list of numbers") from None
    if not all(map(math.isfinite, values)):
        raise UserError(f"{told}: numbers must be finite")
    wanted = {"quota": num_exits if values else 0, "given": num_exits - 1, "never": 0}.get(kind, 1)
    if len(values) != wanted:
        of = {"quota": "one share for each exit", "given": "one threshold for each side exit"}
        raise UserError(
            f"{told} has {len(values)} values; {kind} needs {wanted}"
            + (f", {of[kind]}" if kind in of else "")
        )
    if kind == "quota" and values and not (min(values) >= 0 and math.isclose(sum(values), 1)):
        raise UserError(f"{told}: shares must add up to 1, none of them negative")
    if kind in ("macs", "accuracy") and not 0 <= values[0] <= 1:
        raise UserError(f"{told}: {values[0]:g} must lie in [0, 1]")
    return Rule(kind, values, rest[1] if len(rest) > 1 else "", text)


def by_quotas(entropies: Entropies, shares: Sequence[float]) -> Thresholds:
    """Thresholds with which each exit gets its share of the images, the rest goes to the main one.

    As published: in the order of exits, the threshold is the entropy of rank floor(share n), from
    0, among the images still in, and the images below that rank have left. Images leave below a
    threshold, not at it: where entropies are equal, as those of saturated answers are, fewer leave
    than their share.

    Args:
        entropies: of n images at every side exit.
        shares: of all exits, the main one last.
    """
    left, thresholds = np.asarray(entropies, np.float32), []
    for number, share in enumerate(shares[:-1]):
        quota = int(share * len(entropies) + 1e-9)
        left = left[np.argsort(left[:, number], kind="stable")]
        if quota == 0:
            threshold = NEVER
        elif quota < len(left):
            threshold = left[quota, number]
        else:  # all that are still in leave
            threshold = np.nextafter(left[-1, number], np.inf) if len(left) else NEVER
        thresholds.append(threshold)
        left = left[quota:]
    return np.array(thresholds, np.float32)


def exits_taken(entropies: Entropies, thresholds: Thresholds) -> np.ndarray:
    """The exit at which each image leaves, from 0; the main one is the last; int64 [images]."""
    leaves = np.concatenate([entropies < thresholds, np.ones((len(entropies), 1), bool)], axis=1)
    return np.argmax(leaves, axis=1)


def geometric(num_exits: int) -> list[np.ndarray]:
    """Shares of all exits, from all images at the first exit to all at the main one."""
    powers = np.arange(num_exits)
    found = []
    for ratio in np.concatenate([[0.0], np.geomspace(1e-3, 1e3, _CANDIDATES - 2)]):
        weights = np.power(ratio, powers, dtype=np.float64)
        found.append(weights / weights.sum())
    return [*found, np.eye(num_exits)[-1]]


def by_macs(entropies: Entropies, macs: Sequence[int], share: float) -> Thresholds:
    """Thresholds with the largest mean MACs that are at most a share of the main exit's.

    Args:
        entropies: of validation images.
        macs: of images that leave at each exit, the main one last.
        share: in [0, 1]. If even the first exit costs more, all images leave there.
    """
    costs = np.asarray(macs, np.float64)
    tried = [by_quotas(entropies, shares) for shares in geometric(len(macs))]
    means = np.array([costs[exits_taken(entropies, t)].mean() for t in tried])
    fitting = means <= share * costs[-1]
    return tried[int(np.argmax(np.where(fitting, means, -np.inf)))] if fitting.any() else tried[0]


def by_accuracy(
    entropies: Entropies,
    macs: Sequence[int],
    fall: float,
    judged: tuple[Entropies, Bool[np.ndarray, "images exits"]],
) -> Thresholds:
    """Thresholds with the fewest mean MACs at which accuracy falls by at most ``fall``.

    Args:
        entropies: of clean validation images.
        macs: of images that leave at each exit, the main one last.
        fall: share of the images, below the accuracy of the main exit.
        judged: of the images that the accuracy is of, clean or attacked: entropies, and whether
            each exit is right.
    """
    costs, (judged_entropies, right) = np.asarray(macs, np.float64), judged
    rows = np.arange(len(right))
    tried = [by_quotas(entropies, shares) for shares in geometric(len(macs))]
    means = np.array([costs[exits_taken(entropies, t)].mean() for t in tried])
    accuracies = np.array([right[rows, exits_taken(judged_entropies, t)].mean() for t in tried])
    good = accuracies >= right[:, -1].mean() - fall - 1e-9
    return tried[int(np.argmin(np.where(good, means, np.inf)))]
