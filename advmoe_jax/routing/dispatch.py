"""Sparse dispatch: every sample reaches its chosen experts, none is dropped, shapes are static.

``blocks``: samples are sorted by expert into blocks of equal size, each block of one expert alone.
A batch of ``B`` samples with ``k`` choices among ``N`` experts costs at most
``B k + N (block - 1)`` rows of compute; blocks that a batch does not need are skipped.

``every``: all experts compute all samples, ``B N`` rows, and the chosen are kept. Nothing is sorted
and no loop is run, which may suit a few experts on a large accelerator.

Both give the same answer. Pure functions of arrays: no module, no loss, no router.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from advmoe_jax import target
from advmoe_jax.types import Array

STRATEGIES = ("auto", "blocks", "every")
# Time of one row, relative to others of its table: by platform, by what a row is, by its block's
# size, or ``every`` where all experts compute it. ``found`` says whether it was measured.
_ROW_COSTS = json.loads(Path(__file__).with_name("row_costs.json").read_text())


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

    @property
    def used(self) -> Array:
        """bool [R / block], False for blocks that hold nothing but padding."""
        return self.valid.reshape(len(self.block_expert), -1)[:, 0]


class Every(NamedTuple):
    """The plan of computing every expert: ``indices`` int32 [B, k], the chosen ones."""

    indices: Array


def choose_strategy(
    strategy: str, num_samples: int, num_experts: int, top_k: int = 1, per: str = "image"
) -> str:
    """``blocks`` or ``every``; what ``auto`` stands for depends on the platform's row costs.

    On two CPU cores blocks win at every number of experts, and their cost does not grow with it.

    Args:
        strategy: one of ``STRATEGIES``.
        num_samples: of one device.
        num_experts: to choose among.
        top_k: choices of a sample.
        per: see ``choose_block``.
    """
    costs = _costs(per)
    if strategy != "auto" or "every" not in costs:
        return "blocks" if strategy == "auto" else strategy
    block = choose_block(num_samples * top_k, num_experts, per)
    of_blocks = _cost_of(block, costs, num_samples * top_k, num_experts)
    return "every" if costs["every"] * num_samples * num_experts < of_blocks else "blocks"


def choose_block(num_choices: int, num_experts: int, per: str = "image") -> int:
    """The block size that costs least: small blocks pad little, large ones compute faster.

    Args:
        num_choices: samples times choices of one device.
        num_experts: number of experts; half a block of padding is expected of each.
        per: what a sample is, ``image``, ``image in training`` or ``token``.
    """
    costs = _costs(per)
    sizes = [int(size) for size in costs if size != "every"]
    return min(sizes, key=lambda block: _cost_of(block, costs, num_choices, num_experts))


def _costs(per: str) -> dict[str, float]:
    table = _ROW_COSTS.get(target.platform(), _ROW_COSTS["gpu"])
    return table[per] if per in table else table[per.split()[0]]


def _cost_of(block: int, costs: dict[str, float], num_choices: int, num_experts: int) -> float:
    return costs[str(block)] * (num_choices + min(num_choices, num_experts) * (block - 1) / 2)


def num_blocks(num_choices: int, num_experts: int, block: int) -> int:
    """The most blocks that ``num_choices`` samples can need, however they are routed."""
    padding = min(num_choices, num_experts) * (block - 1)
    return (num_choices + padding) // block


def arrange(
    indices: Array, num_experts: int, strategy: str, block_size: int = 0, per: str = "image"
) -> Plan | Every:
    """The plan of a strategy.

    Args:
        indices: int [B, k], the experts chosen for each sample.
        num_experts: to choose among.
        strategy: one of ``STRATEGIES``.
        block_size: samples per block; 0: see ``choose_block``.
        per: see ``choose_block``.
    """
    if choose_strategy(strategy, len(indices), num_experts, indices.shape[1], per) == "every":
        return Every(indices)
    return plan(indices, num_experts, block_size or choose_block(indices.size, num_experts, per))


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


def of_expert(parameter: Array, expert: Array) -> Array:
    """One expert's slice of a parameter [N, ...].

    Left alone, the TPU's compiler lays a slice of stacked kernels out with the input channels
    innermost, and a convolution of 32 channels then takes 1.7 times as long as with a kernel that
    is an array of its own (its own estimate, see docs/accelerators.md): here it is told.
    """
    taken = parameter[expert]
    if target.platform() != "tpu":
        return taken
    return with_layout_constraint(taken, Layout(tuple(range(taken.ndim))))


def map_blocks(function: Callable[..., Any], plan: Plan, *rows: Array) -> Any:
    """Applies ``function(expert, *blocks)`` to every block in use.

    Args:
        function: maps an expert's number and blocks of rows [block, ...] to a tree of arrays
            [block, ...].
        plan: the plan that sorted the rows.
        *rows: arrays [R, ...] in sorted order.

    Returns:
        The tree of outputs [R, ...] in sorted order; zero in blocks that are not in use.
    """
    blocks = len(plan.block_expert)
    items = (plan.block_expert, *(r.reshape(blocks, -1, *r.shape[1:]) for r in rows))
    skipped = _zeros_of(function, *(item[0] for item in items))

    def one_block(item: tuple[Array, tuple[Array, ...]]) -> Any:
        used, operands = item
        return lax.cond(used, function, lambda *_: skipped, *operands)

    outputs = lax.map(one_block, (plan.used, items))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def map_experts(
    function: Callable[..., Array], rows: Array, plan: Plan, parameters: tuple[Array, ...]
) -> Array:
    """Applies ``function(block_of_rows, *expert_parameters)`` to every block in use.

    Its gradient evaluates ``function`` anew, which costs nothing where a gradient needs the inputs
    alone, as a convolution's does. It is written out because for every block it adds to one
    expert's gradient, where JAX's own would add arrays of all experts.

    Args:
        function: maps rows [block, ...] and one expert's parameters to rows [block, ...].
        rows: [R, ...] in sorted order.
        plan: the plan that sorted them.
        parameters: arrays [N, ...], one slice per expert.

    Returns:
        [R, ...], the outputs in sorted order; zero in blocks that are not in use.
    """
    # Inside a shard_map, parameters that are the same on all devices must from here on vary as the
    # rows do. JAX does so by itself where it derives a gradient, and sums it over the devices.
    parameters = tuple(p + jnp.zeros_like(rows, shape=(), dtype=p.dtype) for p in parameters)
    return _map_experts(function, rows, plan, parameters)


def apply_experts(
    function: Callable[..., Array],
    samples: Array,
    plan: Plan | Every,
    weights: Array,
    parameters: tuple[Array, ...],
) -> Array:
    """Samples [B, ...] -> [B, ...], the weighted sum of what their chosen experts answer.

    Args:
        function: maps rows [., ...] and one expert's parameters to rows [., ...].
        samples: the batch.
        plan: of either strategy.
        weights: [B, k], of the choices.
        parameters: arrays [N, ...], one slice per expert.
    """
    if isinstance(plan, Plan):
        return combine(
            map_experts(function, gather(samples, plan), plan, parameters), plan, weights
        )
    answers = jax.vmap(function, (None, *(0 for _ in parameters)))(samples, *parameters)
    share = shares(plan, weights, len(answers)).astype(answers.dtype).T
    return jnp.sum(answers * share.reshape(share.shape + (1,) * (answers.ndim - 2)), axis=0)


def shares(plan: Every, weights: Array, num_experts: int) -> Array:
    """``weights`` [B, k] of a plan's choices -> [B, N], zero for experts that are not chosen."""
    chosen = jax.nn.one_hot(plan.indices, num_experts, dtype=weights.dtype)
    return jnp.einsum("bk,bkn->bn", weights, chosen)


def _of_expert(
    function: Callable[..., Array], parameters: tuple[Array, ...]
) -> Callable[[Array, Array], Array]:
    return lambda expert, block: function(block, *(of_expert(p, expert) for p in parameters))


def _map_experts(
    function: Callable[..., Array], rows: Array, plan: Plan, parameters: tuple[Array, ...]
) -> Array:
    return map_blocks(_of_expert(function, parameters), plan, rows)


def _map_experts_forward(
    function: Callable[..., Array], rows: Array, plan: Plan, parameters: tuple[Array, ...]
) -> tuple[Array, Any]:
    return _map_experts(function, rows, plan, parameters), (rows, plan, parameters)


def _map_experts_backward(
    function: Callable[..., Array], residuals: Any, cotangent: Array
) -> tuple[Array, None, tuple[Array, ...]]:
    rows, plan, parameters = residuals

    def pull(expert: Array, block: Array, cotangent: Array) -> tuple[Array, ...]:
        here = (of_expert(p, expert) for p in parameters)
        return jax.vjp(function, block, *here)[1](cotangent)

    def one_block(
        totals: tuple[Array, ...], item: tuple[Array, tuple[Array, ...]]
    ) -> tuple[tuple[Array, ...], Array]:
        used, operands = item
        to_block, *to_parameters = lax.cond(used, pull, lambda *_: skipped, *operands)
        # Outside the conditional, where the sum is updated in place.
        expert = operands[0]
        pairs = zip(totals, to_parameters, strict=True)
        added = [t.at[expert].add(g.astype(t.dtype)) for t, g in pairs]
        return tuple(added), to_block

    blocks = len(plan.block_expert)
    items = (
        plan.block_expert,
        *(a.reshape(blocks, -1, *a.shape[1:]) for a in (rows, cotangent)),
    )
    skipped = _zeros_of(pull, *(item[0] for item in items))
    # In 16 bits a sum over many blocks would lose what is added last.
    none = tuple(jnp.zeros_like(p, dtype=jnp.promote_types(p.dtype, "float32")) for p in parameters)
    totals, to_rows = lax.scan(one_block, none, (plan.used, items))
    to_parameters = tuple(t.astype(p.dtype) for t, p in zip(totals, parameters, strict=True))
    return to_rows.reshape(rows.shape), None, to_parameters


_map_experts = jax.custom_vjp(_map_experts, nondiff_argnums=(0,))
_map_experts.defvjp(_map_experts_forward, _map_experts_backward)


def _zeros_of(function: Callable[..., Any], *args: Array) -> Any:
    """Zeros of the shapes and dtypes of ``function(*args)``, made like the last of ``args``.

    Like an argument, so that they vary over the same mesh axes inside a shard_map.
    """
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda s: jnp.zeros_like(args[-1], shape=s.shape, dtype=s.dtype), shapes)
