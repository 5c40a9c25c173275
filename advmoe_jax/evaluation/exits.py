"""What a multi-exit network did with images: where they left, who was right, what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.evaluation.exit_costs import ExitCosts
from advmoe_jax.evaluation.thresholds import (
    Rule,
    by_accuracy,
    by_macs,
    by_quotas,
    exits_taken,
    geometric,
)
from advmoe_jax.models.trunk import NEVER

_CURVE = 25  # points of a curve, about


def choose_thresholds(
    rule: Rule, costs: ExitCosts, clean: Outcome, attacked: Outcome | None = None
) -> np.ndarray:
    """Thresholds by a rule, float32 [side exits].

    Args:
        rule: see ``thresholds``.
        costs: of leaving at each exit; every head that ran is counted.
        clean: what the network said of the images that thresholds are chosen on.
        attacked: the same under the rule's attack, if it names one.
    """
    count = clean.exit_correct.shape[1]
    if rule.kind == "never":
        return np.full(count - 1, NEVER, np.float32)
    if rule.kind == "given":
        return np.array(rule.values, np.float32)
    if rule.kind == "quota":
        return by_quotas(clean.entropies, rule.values or (1 / count,) * count)
    if rule.kind == "macs":
        return by_macs(clean.entropies, costs.every, rule.values[0])
    judged = clean if attacked is None else attacked
    pair = (judged.entropies, judged.exit_correct)
    return by_accuracy(clean.entropies, costs.every, rule.values[0], pair)


def sweep(clean: Outcome) -> list[np.ndarray]:
    """Thresholds from those that send all images to the first exit to those that send none there.

    Args:
        clean: what the network said of the images that thresholds are chosen on.
    """
    every = geometric(clean.exit_correct.shape[1])
    shares = [*every[:: len(every) // _CURVE], every[-1]]
    return [by_quotas(clean.entropies, of_exits) for of_exits in shares]


def summary(
    outcomes: Mapping[str, Outcome], costs: ExitCosts, swept: Sequence[np.ndarray] = ()
) -> dict[str, Any]:
    """By attack, and for ``clean``, what is told of the exits.

    ``share``: of the images that left at each exit; ``accuracy``: of each exit alone, on all
    images; ``macs``: mean multiply-accumulates per image: ``every`` head that ran, the ``own`` head
    only, ``published`` (RDI-Nets' unit of 2^20, convolutions alone). ``curve``: of each of the
    thresholds ``swept``, mean MACs of every head that ran, and accuracy. Images were not attacked
    anew for them.
    """
    return {name: _of_one(outcome, costs, swept) for name, outcome in outcomes.items()}


def _of_one(outcome: Outcome, costs: ExitCosts, swept: Sequence[np.ndarray]) -> dict[str, Any]:
    count = outcome.exit_correct.shape[1]
    share = np.bincount(outcome.exits, minlength=count) / len(outcome.exits)
    means = {
        name: float(share @ np.array(getattr(costs, name)))
        for name in ("every", "own", "published")
    }
    return {
        "share": share.tolist(),
        "accuracy": outcome.exit_correct.mean(axis=0).tolist(),
        "macs": means,
        "curve": [_point(outcome, costs, thresholds) for thresholds in swept],
    }


def _point(outcome: Outcome, costs: ExitCosts, thresholds: np.ndarray) -> list[float]:
    taken = exits_taken(outcome.entropies, thresholds)
    right = outcome.exit_correct[np.arange(len(taken)), taken]
    return [float(np.array(costs.every)[taken].mean()), float(right.mean())]
