"""Routing: what is chosen, how samples reach their experts, what is measured of it."""

from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.routing.choice import GATES, Routing, choose
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
    "Capacity",
    "Every",
    "Plan",
    "Routing",
    "apply_experts",
    "choose",
    "map_blocks",
    "map_experts",
    "plan",
]
