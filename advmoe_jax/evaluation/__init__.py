"""Evaluation: accuracy under attack, what networks cost, how fast they are, what routers do."""

from advmoe_jax.evaluation import views
from advmoe_jax.evaluation.accuracy import (
    Evaluator,
    Outcome,
    agreement,
    create_evaluator,
    routing_summary,
)
from advmoe_jax.evaluation.cost import (
    count_macs,
    count_params,
    default_router,
    keep_for,
    network_cost,
)
from advmoe_jax.evaluation.named_attacks import ATTACKS, named_attack
from advmoe_jax.evaluation.records import NamedAttack, Protocol, Record
from advmoe_jax.evaluation.throughput import images_per_second
from advmoe_jax.evaluation.wanted import parse_attacks

__all__ = [
    "ATTACKS",
    "Evaluator",
    "NamedAttack",
    "Outcome",
    "Protocol",
    "Record",
    "agreement",
    "count_macs",
    "count_params",
    "create_evaluator",
    "default_router",
    "images_per_second",
    "keep_for",
    "named_attack",
    "network_cost",
    "parse_attacks",
    "routing_summary",
    "views",
]
