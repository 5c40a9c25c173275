"""What is measured of routes: load, entropy, agreement, confusion, collapse.

All functions but ``entropy`` take arrays of JAX or NumPy, and answer in kind.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from advmoe_jax.types import Array

# An expert with less than this share of the images is as good as gone.
COLLAPSED = 0.01


def of_layers(x: Array, routers: int | None) -> Array:
    """The decisions of each layer together: [B, D, ...] -> [B D / L, L, ...].

    Of networks with one decision per image and layer nothing changes. Where every token decides,
    tokens are what all measures here and in ``training.balance`` then count, layer by layer.

    Args:
        x: anything of each decision.
        routers: number L of layers that are routed by themselves, see ``Network.num_routers``;
            None: one for each decision.
    """
    routers = routers or x.shape[1]
    split = x.reshape(len(x), routers, x.shape[1] // routers, *x.shape[2:])
    return split.swapaxes(1, 2).reshape(-1, routers, *x.shape[2:])


def load(
    indices: Int[Array, "batch decisions k"], num_experts: int
) -> Float[Array, "decisions experts"]:
    """The share of the choices that fall on each expert, in [0, 1]."""
    return (indices[..., None] == np.arange(num_experts)).mean(axis=(0, 2))


def entropy(scores: Float[Array, "*any experts"]) -> Float[Array, "*any"]:
    """The entropy of softmax(scores), in nats."""
    log_probs = jax.nn.log_softmax(scores)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def agreement(
    clean: Int[Array, "batch decisions k"], attacked: Int[Array, "batch decisions k"]
) -> Float[Array, " decisions"]:
    """The share of images whose first choice survives the attack, in [0, 1].

    An expert of -1 was chosen and dropped: such a choice does not survive.
    """
    return ((clean[..., 0] == attacked[..., 0]) & (clean[..., 0] >= 0)).mean(axis=0)


def overlap(
    clean: Int[Array, "batch decisions k"], attacked: Int[Array, "batch decisions k"]
) -> Float[Array, "batch decisions"]:
    """Intersection over union of the experts chosen, in [0, 1].

    1 - its mean is the ``routing_changes`` of the study of V-MoE (Puigcerver et al., NeurIPS 2022).
    An expert of -1 was chosen and dropped, and does not count; of nothing and nothing it is 0, as
    in the published code. The experts of one decision differ from each other.
    """
    one, other = clean[..., :, None], attacked[..., None, :]
    common = ((one == other) & (one >= 0)).sum(axis=(-2, -1))
    union = (clean >= 0).sum(axis=-1) + (attacked >= 0).sum(axis=-1) - common
    return common / (union + (union == 0))


def confusion(
    clean: Int[Array, "batch decisions k"],
    attacked: Int[Array, "batch decisions k"],
    num_experts: int,
) -> Float[Array, "decisions experts experts"]:
    """The share of images whose first choice is the row's expert clean, the column's attacked."""
    experts = np.arange(num_experts)
    first, second = clean[..., 0, None] == experts, attacked[..., 0, None] == experts
    return (first[..., :, None] & second[..., None, :]).mean(axis=0)


def by_decision(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the decisions, and all of them under ``layers`` if there are several.

    Args:
        measured: arrays with the decisions as their first axis, such as ``load``'s.
    """
    means = {name: values.mean(axis=0) for name, values in measured.items()}
    several = any(len(values) > 1 for values in measured.values())
    return {**means, "layers": dict(measured)} if several else means


def collapse_warnings(routing: Mapping[str, Any] | None, when: str) -> list[str]:
    """One warning for each expert that is hardly used; one for all layers that have such.

    Args:
        routing: with ``load``, the share of each expert, and ``layers`` if there are several
            decisions; None for a network without a router.
        when: ends the warning's first clause, such as "in epoch 3".
    """
    if routing is None:
        return []
    advice = (
        "Try balance.importance=5, a lower optimizer.router.learning_rate or, where "
        "loss.router_objective=pathway trains the router, assignment in its place"
    )
    if "layers" in routing:
        loads = routing["layers"]["load"]
        collapsed = [str(i) for i, shares in enumerate(loads) if min(shares) < COLLAPSED]
        which = f"{len(collapsed)} of {len(loads)} MoE layers ({', '.join(collapsed)})"
        return collapsed and [
            f"in {which} an expert got less than {100 * COLLAPSED:g}% of the images {when}: their "
            "routers have collapsed, "
            f"and the network is turning into a smaller dense one. {advice}"
        ]
    return [
        f"expert {i} got {100 * share:.2f}% of the images {when}: the router has collapsed, and "
        f"the network is turning into a smaller dense one. {advice}"
        for i, share in enumerate(routing["load"])
        if share < COLLAPSED
    ]
