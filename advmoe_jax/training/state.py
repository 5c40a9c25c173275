"""What training carries from step to step."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from advmoe_jax.types import Array, Tree

# One gradient transformation for each part of a network, by the part's name.
Optimizers = Mapping[str, optax.GradientTransformation]


class TrainState(NamedTuple):
    """A network's parameters by their parts, each part with its own optimizer.

    Attributes:
        step: int32 scalar, completed steps.
        params: parameters, a dict of the network's parts.
        stats: BatchNorm statistics, of the same parts.
        opt_state: optimizer states, of the same parts.
        average: {"params": ..., "stats": ...} averaged over the steps, in float32; None if no
            average is kept, and then a checkpoint holds no trace of it.
    """

    step: Array
    params: Tree
    stats: Tree
    opt_state: Tree
    average: Tree | None = None


def create_state(
    params: Tree, stats: Tree, optimizers: Optimizers, averaged: bool = False
) -> TrainState:
    """The state before the first step; ``averaged``: with an average of the weights."""
    opt_state = {name: optimizers[name].init(params[name]) for name in params}
    average = None
    if averaged:
        average = jax.tree.map(lambda x: x.astype(jnp.float32), {"params": params, "stats": stats})
    return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state, average)


def update(state: TrainState, grads: Tree, optimizers: Optimizers) -> TrainState:
    """One optimizer step on each part that ``grads`` has; the others stay as they are.

    The step counter is not touched: a method may update one part after the other.
    """
    params, opt_state = dict(state.params), dict(state.opt_state)
    for name, gradient in grads.items():
        updates, opt_state[name] = optimizers[name].update(gradient, opt_state[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    return state._replace(params=params, opt_state=opt_state)


def update_average(state: TrainState, decay: float, start: int = 0) -> TrainState:
    """One step of the exponential moving average of parameters and BatchNorm statistics.

    average <- d average + (1 - d) weights, with d = min(decay, t / (t + 9)) in the step after t
    others: early weights are forgotten faster, as by TensorFlow's ``ExponentialMovingAverage``.
    Rebuffi et al. (2021, arXiv 2103.01946) report what averaging does for adversarial training.

    Args:
        state: after a step, with its counter moved.
        decay: in [0, 1).
        start: steps that are not averaged over; until then the average is the weights.
    """
    steps = jnp.maximum(state.step - 1 - start, 0).astype(jnp.float32)
    moving = 1 - jnp.minimum(decay, steps / (steps + 9))
    weights = {"params": state.params, "stats": state.stats}
    return state._replace(average=optax.incremental_update(weights, state.average, moving))


def evaluated(state: TrainState) -> tuple[Tree, Tree]:
    """The (parameters, statistics) to measure: the average if there is one."""
    if state.average is None:
        return state.params, state.stats
    weights = (state.params, state.stats)
    averages = (state.average["params"], state.average["stats"])
    return jax.tree.map(lambda x, like: x.astype(like.dtype), averages, weights)
