"""Routing: what is chosen, how samples reach their experts, what is measured of it."""

from advmoe_jax.routing.choice import GATES, Routing, choose, follow
from advmoe_jax.routing.dispatch import (
    STRATEGIES,
    Every,
    Plan,
    apply_experts,
    map_blocks,
    map_experts,
    plan,
)

__all__ = [
    "GATES",
    "STRATEGIES",
    "Every",
    "Plan",
    "Routing",
    "apply_experts",
    "choose",
    "follow",
    "map_blocks",
    "map_experts",
    "plan",
]
