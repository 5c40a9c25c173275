"""How a network routes: the load of its experts, the router's entropy, what survives an attack."""

from typing import Any

import numpy as np

from advmoe_jax.evaluation.accuracy import Outcome


def routing_summary(outcome: Outcome, num_experts: int) -> dict[str, Any] | None:
    """Share of choices per expert and mean routing entropy (nats); None for a dense network.

    Routers per layer: means over the layers, and ``layers`` holds the same of each.
    """
    if outcome.choices is None:
        return None
    summary = {
        "load": _load(outcome.choices, num_experts),
        "entropy": float(np.mean(outcome.entropy)),
    }
    if outcome.choices.ndim == 3:
        summary["layers"] = {
            "load": [_load(layer, num_experts) for layer in np.moveaxis(outcome.choices, 1, 0)],
            "entropy": np.mean(outcome.entropy, axis=0).tolist(),
        }
    return summary


def _load(choices: np.ndarray, num_experts: int) -> list[float]:
    return (np.bincount(choices.ravel(), minlength=num_experts) / choices.size).tolist()


def agreement(clean: Outcome, attacked: Outcome) -> float | None:
    """Share of first choices that survive the attack, over images (and layers); None if dense."""
    kept = layer_agreement(clean, attacked)
    return None if kept is None else float(np.mean(kept))


def layer_agreement(clean: Outcome, attacked: Outcome) -> list[float] | None:
    """``agreement`` of each layer [L], [1] for a global router; None for a dense network."""
    if clean.choices is None:
        return None
    same = clean.choices[..., 0] == attacked.choices[..., 0]
    return np.mean(same.reshape(len(same), -1), axis=0).tolist()
