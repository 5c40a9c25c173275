"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Tree = dict[str, Any]


class TrainState(NamedTuple):
    """Parameters in two subtrees, ``router`` and ``experts``, each with its own optimizer.

    Attributes:
        step: int32 scalar, completed steps.
        params: parameters, {"router": ..., "experts": ...}.
        stats: BatchNorm statistics, the same two branches.
        opt_state: optimizer states, the same two branches.
    """

    step: Array
    params: Tree
    stats: Tree
    opt_state: Tree


class Optimizers(NamedTuple):
    """One gradient transformation for each subtree of the parameters."""

    router: optax.GradientTransformation
    experts: optax.GradientTransformation


def create_state(params: Tree, stats: Tree, optimizers: Optimizers) -> TrainState:
    """The state before the first step."""
    opt_state = {name: getattr(optimizers, name).init(params[name]) for name in params}
    return TrainState(jnp.zeros((), jnp.int32), params, stats, opt_state)


def update(state: TrainState, grads: Tree, optimizers: Optimizers) -> TrainState:
    """One optimizer step on each subtree that ``grads`` has; the others stay as they are.

    The step counter is not touched: a method may update one subtree after the other.
    """
    params, opt_state = dict(state.params), dict(state.opt_state)
    for name, gradient in grads.items():
        updates, opt_state[name] = getattr(optimizers, name).update(
            gradient, opt_state[name], params[name]
        )
        params[name] = optax.apply_updates(params[name], updates)
    return state._replace(params=params, opt_state=opt_state)
