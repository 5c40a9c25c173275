"""Sparse dispatch: every sample reaches its chosen experts, none is dropped, shapes are static.

Samples are sorted by expert into blocks of equal size, each block wholly of one expert. A batch of
``B`` samples with ``k`` choices among ``N`` experts costs at most ``B k + N (block - 1)`` rows of
compute, whatever ``N`` is; computing every expert and masking costs ``B N``.

Pure functions of arrays: no module, no loss, no router.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Plan(NamedTuple):
    """Where every sample goes. ``R = len(block_expert) * block`` rows in sorted order.

    Attributes:
        source: int32 [R], the sample that each row holds (0 in rows of padding).
        choice: int32 [R], which of its ``k`` choices the row serves.
        valid: bool [R], False in rows of padding.
        block_expert: int32 [R / block], the expert of each block.
        position: int32 [B, k], the row of each sample's choice.
    """

    source: Array
    choice: Array
    valid: Array
    block_expert: Array
    position: Array


def num_blocks(num_choices: int, num_experts: int, block: int) -> int:
    """The most blocks that ``num_choices`` samples can need, however they are routed."""
    padding = min(num_choices, num_experts) * (block - 1)
    return (num_choices + padding) // block


def plan(indices: Array, num_experts: int, block: int) -> Plan:
    """Sorts samples by expert into blocks.

    Args:
        indices: int [B, k], the experts chosen for each sample, in [0, num_experts).
        num_experts: number of experts ``N``.
        block: samples per block; a block larger than the batch is cut to the batch.

    Returns:
        The plan; the order of samples within an expert is the order of the batch.
    """
    batch, k = indices.shape
    total = batch * k
    block = min(block, total)
    blocks = num_blocks(total, num_experts, block)
    chosen = indices.reshape(total).astype(jnp.int32)

    one_hot = (chosen[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
    seen = jnp.cumsum(one_hot, axis=0)
    rank = jnp.take_along_axis(seen, chosen[:, None], axis=1)[:, 0] - 1
    end_block = jnp.cumsum(-(-seen[-1] // block))
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), end_block[:-1]])
    row = first_block[chosen] * block + rank

    pair = jnp.zeros(blocks * block, jnp.int32).at[row].set(jnp.arange(total, dtype=jnp.int32))
    valid = jnp.zeros(blocks * block, bool).at[row].set(True)
    # Blocks behind the last one in use hold padding only; any expert will do for them.
    expert = jnp.sum(jnp.arange(blocks)[:, None] >= end_block, axis=1)
    return Plan(
        source=pair // k,
        choice=pair % k,
        valid=valid,
        block_expert=jnp.minimum(expert, num_experts - 1).astype(jnp.int32),
        position=row.reshape(batch, k),
    )


def gather(samples: Array, plan: Plan) -> Array:
    """Samples [B, ...] -> rows [R, ...] in sorted order."""
    return samples[plan.source]


def row_weights(weights: Array, plan: Plan) -> Array:
    """Weights [B, k] of the choices -> weights [R] of the rows."""
    return weights[plan.source, plan.choice]


def combine(rows: Array, plan: Plan, weights: Array) -> Array:
    """Rows [R, ...] -> samples [B, ...], each the weighted sum of its ``k`` choices."""
    chosen = rows[plan.position]
    weights = weights.reshape(weights.shape + (1,) * (rows.ndim - 1)).astype(rows.dtype)
    return jnp.sum(chosen * weights, axis=1)


def map_blocks(
    function: Callable[..., Array], rows: Array, plan: Plan, parameters: tuple[Array, ...]
) -> Array:
    """Applies ``function(block_of_rows, *expert_parameters)`` to every block.

    Args:
        function: maps rows [block, ...] and one expert's parameters to rows [block, ...].
        rows: [R, ...] in sorted order.
        plan: the plan that sorted them.
        parameters: arrays [N, ...], one slice per expert.

    Returns:
        [R, ...], the outputs in sorted order.
    """
    blocks = len(plan.block_expert)
    stacked = rows.reshape(blocks, rows.shape[0] // blocks, *rows.shape[1:])

    def one_block(item: tuple[Array, Array]) -> Array:
        block, expert = item
        return function(block, *(p[expert] for p in parameters))

    outputs = jax.lax.map(one_block, (stacked, plan.block_expert))
    return outputs.reshape(rows.shape[0], *outputs.shape[2:])
