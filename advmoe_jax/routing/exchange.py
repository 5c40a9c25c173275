"""Experts on several devices: choices travel to their expert's device and back, none is dropped.

Along the mesh axis ``expert`` each of G devices holds N / G experts of every layer, and a part of
the batch of its own. A device has a seat for ``ROOM`` times its even share of every other's
choices. What finds no seat travels in another round, as many as the fullest of them needs: shapes
are static, and a load that is nearly even takes one. Per device, layer and direction,

- a round sends ``ROOM`` B k (G - 1) / G vectors, and if all choices fall on one device there are
  at most G / ``ROOM`` rounds: B k (G - 1) vectors;
- to gather the tokens of all G devices, compute, and scatter the sums would always send
  B (G - 1), and always hold the rows of G devices, which is what sharding is to avoid.

Its own choices it also sends to itself, which is no traffic.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.parallel import EXPERT_AXIS
from advmoe_jax.routing import dispatch
from advmoe_jax.types import Array

# Seats over what an even load needs.
ROOM = 1.25
_MULTIPLE = 8  # of seats


class Sharded(NamedTuple):
    """The plan where the experts are on the devices of a mesh axis.

    Attributes:
        indices: int32 [B, k], the experts chosen, of all.
        held: how many of them each device has, in their order.
        plan: (indices int32 [rows, 1], number of experts) -> the plan of a device for its own.
    """

    indices: Array
    held: int
    plan: Callable[[Array, int], dispatch.Plan | dispatch.Every]


AnyPlan = dispatch.Plan | dispatch.Every | Sharded


class _Journey(NamedTuple):
    """How choices travel; all but ``function`` and ``plan`` are numbers, see ``Sharded``."""

    function: Callable[..., Array]
    plan: Callable[[Array, int], dispatch.Plan | dispatch.Every]
    held: int
    top_k: int
    seats: int
    devices: int


class _Tickets(NamedTuple):
    """Of each choice, int32 [B k].

    Attributes:
        round: in which it travels.
        seat: in [0, devices * seats), of its device and there.
        expert: in [0, held), of its device.
    """

    round: Array
    seat: Array
    expert: Array


def seats(choices: int, devices: int) -> int:
    """How many of a device's choices another one takes in one round."""
    even = -(-choices // devices) * ROOM
    return min(choices, -(-int(even) // _MULTIPLE) * _MULTIPLE)


def apply_experts(
    function: Callable[..., Array],
    samples: Array,
    plan: AnyPlan,
    weights: Array,
    parameters: tuple[Array, ...],
) -> Array:
    """As ``dispatch.apply_experts``; of a ``Sharded`` plan, inside a shard_map over ``expert``.

    There ``parameters`` are arrays [held, ...] of the device's own experts, and so are their
    gradients: sums over the choices of all devices along the axis.
    """
    if not isinstance(plan, Sharded):
        return dispatch.apply_experts(function, samples, plan, weights, parameters)
    choices, devices = plan.indices.size, lax.axis_size(EXPERT_AXIS)
    journey = _Journey(
        function,
        plan.plan,
        plan.held,
        plan.indices.shape[1],
        seats(choices, devices),
        devices,
    )
    tickets, rounds = _book(journey, plan.indices)
    first = _one_round(journey, jnp.zeros((), jnp.int32), tickets, samples, parameters)
    answers = _and_later(journey, first, tickets, rounds, samples, parameters)
    answers = answers.reshape(*plan.indices.shape, *answers.shape[1:])
    weights = weights.reshape(weights.shape + (1,) * (answers.ndim - 2)).astype(answers.dtype)
    return jnp.sum(answers * weights, axis=1)


def _book(journey: _Journey, indices: Array) -> tuple[_Tickets, Array]:
    """Of all choices, and how many rounds there are: the same for all devices of the axis."""
    chosen = indices.reshape(-1).astype(jnp.int32)
    device = chosen // journey.held
    one_hot = (device[:, None] == jnp.arange(journey.devices)).astype(jnp.int32)
    seen = jnp.cumsum(one_hot, axis=0)
    rank = jnp.take_along_axis(seen, device[:, None], axis=1)[:, 0] - 1
    fullest = lax.pmax(jnp.max(seen[-1]), EXPERT_AXIS)
    tickets = _Tickets(
        rank // journey.seats,
        device * journey.seats + rank % journey.seats,
        chosen % journey.held,
    )
    return tickets, -(-fullest // journey.seats)


def _one_round(
    journey: _Journey,
    number: Array,
    tickets: _Tickets,
    samples: Array,
    parameters: tuple[Array, ...],
) -> Array:
    """The answers [B k, ...] to the choices that travel in this round; zeros in others' places."""
    count, total = len(tickets.seat), journey.devices * journey.seats
    travels = tickets.round == number
    seat = jnp.where(travels, tickets.seat, total)  # there is no such seat: it is not written to
    choice = jnp.full(total, count, jnp.int32).at[seat].set(jnp.arange(count), mode="drop")
    expert = jnp.full(total, journey.held, jnp.int32).at[seat].set(tickets.expert, mode="drop")
    sent = samples.at[choice // journey.top_k].get(mode="fill", fill_value=0)
    arrived, wanted = _exchanged(sent), _exchanged(expert)
    answers = _own_experts(journey, arrived, wanted, parameters)
    answers = _exchanged(answers)[tickets.seat]
    return jnp.where(travels.reshape(-1, *(1,) * (answers.ndim - 1)), answers, 0)


def _exchanged(seated: Array) -> Array:
    """[devices * seats, ...]: what each device has for every other -> what every other has for it.

    It is its own inverse, and its own transpose.
    """
    return lax.all_to_all(seated, EXPERT_AXIS, 0, 0, tiled=True)


def _own_experts(
    journey: _Journey, samples: Array, experts: Array, parameters: tuple[Array, ...]
) -> Array:
    """What the device's experts make of what has arrived; zeros of empty seats, which cost none.

    Args:
        journey: how choices travel.
        samples: [rows, ...].
        experts: int32 [rows], ``held`` for an empty seat.
        parameters: of the device's experts.
    """
    # Empty seats are sorted as those of one expert more, whose blocks are not in use.
    plan = journey.plan(experts[:, None], journey.held + 1)
    if isinstance(plan, dispatch.Plan):
        block = len(plan.valid) // len(plan.block_expert)
        is_own = plan.block_expert < journey.held
        plan = plan._replace(
            valid=plan.valid & jnp.repeat(is_own, block),
            block_expert=jnp.minimum(plan.block_expert, journey.held - 1),
        )
    ones = jnp.ones((len(experts), 1), samples.dtype)
    return dispatch.apply_experts(journey.function, samples, plan, ones, parameters)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _and_later(
    journey: _Journey,
    first: Array,
    tickets: _Tickets,
    rounds: Array,
    samples: Array,
    parameters: tuple[Array, ...],
) -> Array:
    """``first``, and the answers of all rounds behind it; seldom there are any.

    The gradient makes these rounds again: how many there are is not known when memory is planned.
    """

    def add(number: Array, answers: Array) -> Array:
        return answers + _one_round(journey, number, tickets, samples, parameters)

    return lax.fori_loop(1, rounds, add, first)


def _and_later_forward(journey: _Journey, first: Array, *rest: Any) -> tuple[Array, Any]:
    return _and_later(journey, first, *rest), rest


def _and_later_backward(
    journey: _Journey, rest: Any, cotangent: Array
) -> tuple[Array, None, None, Array, tuple[Array, ...]]:
    tickets, rounds, *of_interest = rest

    def add(number: Array, totals: Any) -> Any:
        answer = partial(_one_round, journey, number, tickets)
        return jax.tree.map(jnp.add, totals, jax.vjp(answer, *of_interest)[1](cotangent))

    none = jax.tree.map(jnp.zeros_like, tuple(of_interest))
    to_samples, to_parameters = lax.fori_loop(1, rounds, add, none)
    return cotangent, None, None, to_samples, to_parameters


_and_later.defvjp(_and_later_forward, _and_later_backward)
