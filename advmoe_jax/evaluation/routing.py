"""How a network routes: the load of its experts, the router's entropy, what survives an attack."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome

# An expert with less than this share of the images is as good as gone.
COLLAPSED = 0.01


def routing_summary(outcome: Outcome, num_experts: int) -> dict[str, Any] | None:
    """Share of choices per expert and mean routing entropy (nats); None for a dense network."""
    if outcome.choices is None:
        return None
    load = np.bincount(outcome.choices.ravel(), minlength=num_experts) / outcome.choices.size
    return {"load": load.tolist(), "entropy": float(np.mean(outcome.entropy))}


def agreement(clean: Outcome, attacked: Outcome) -> float | None:
    """Share of images whose first choice survives the attack; None for a dense network."""
    if clean.choices is None:
        return None
    return float(np.mean(clean.choices[:, 0] == attacked.choices[:, 0]))


def collapse_warnings(routing: Mapping[str, Any] | None, when: str) -> list[str]:
    """One warning for each expert that is hardly used.

    Args:
        routing: with ``load``, the share of each expert; None for a dense network.
        when: ends the warning's first clause, such as "in epoch 3".
    """
    if routing is None:
        return []
    return [
        f"expert {i} got {100 * share:.2f}% of the images {when}: the router has collapsed, and "
        "the network is turning into a smaller dense one. Try loss.router_objective=assignment, "
        "a lower optimizer.router.learning_rate or more optimizer.router.warmup_epochs"
        for i, share in enumerate(routing["load"])
        if share < COLLAPSED
    ]
