"""Training: methods and their steps, state, optimizers; and the loop, its log, its checkpoints."""

from advmoe_jax.training.balance import Balance
from advmoe_jax.training.methods import METHODS, Method, Settings, Step, create_step, method
from advmoe_jax.training.optimizers import OptimizerSettings, create_optimizer
from advmoe_jax.training.state import Optimizers, TrainState, create_state, evaluated

__all__ = [
    "METHODS",
    "Balance",
    "Method",
    "OptimizerSettings",
    "Optimizers",
    "Settings",
    "Step",
    "TrainState",
    "create_optimizer",
    "create_state",
    "create_step",
    "evaluated",
    "method",
]
