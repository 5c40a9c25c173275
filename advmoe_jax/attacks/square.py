"""Square attack: random search with square patches; needs no gradient.

Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial
attack via random search", ECCV 2020, algorithms 1 to 3; for l1 Croce and Hein, "Mind the box:
l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021, section 5.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks.constraints import Threat, project
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.losses import Loss, make_loss, name_of
from advmoe_jax.attacks.losses import targeted as aimed_at
from advmoe_jax.attacks.pgd import Attack
from advmoe_jax.attacks.stepwise import Batch, Stepwise, as_attack, select
from advmoe_jax.types import Array

# After so many of 10,000 queries the share of pixels changed at once is halved (section 5).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class State(NamedTuple):
    """As ``stepwise.State``; ``adversarial`` is the best image so far, ``score`` its loss."""

    count: Array
    fooled: Array
    score: Array
    adversarial: Array


def square(
    threat: Threat,
    *,
    num_queries: int = 5000,
    p: float = 0.8,
    loss: str | Loss = "margin",
    restarts: int = 1,
    targeted: bool = False,
    rescale_schedule: bool = True,
) -> Attack:
    """Square attack on images [B, H, W, C].

    Args:
        threat: the ball and the pixel range.
        num_queries: calls of the function per run.
        p: share of the pixels changed at once in the beginning, in (0, 1].
        loss: what is maximised.
        restarts: independent runs.
        targeted: the labels are classes to reach.
        rescale_schedule: squeeze the schedule of ``p``, made for 10,000 queries, into
            ``num_queries``.

    Raises:
        ValueError: if a setting is not valid; when called, if images are not [B, H, W, C], or
            seem to have their channels before rows and columns, as PyTorch's have.
    """
    return as_attack(
        threat,
        square_steps(
            threat,
            num_queries=num_queries,
            p=p,
            loss=loss,
            restarts=restarts,
            targeted=targeted,
            rescale_schedule=rescale_schedule,
        ),
    )


def square_steps(
    threat: Threat,
    *,
    num_queries: int = 5000,
    p: float = 0.8,
    loss: str | Loss = "margin",
    restarts: int = 1,
    targeted: bool = False,
    rescale_schedule: bool = True,
) -> Stepwise:
    """``square`` cut into steps, one query each."""
    if num_queries < 1 or restarts < 1 or not 0 < p <= 1:
        raise ValueError(
            f"num_queries={num_queries} and restarts={restarts} must be positive, p={p} in (0, 1]"
        )
    loss = make_loss(loss) if isinstance(loss, str) else loss
    loss = aimed_at(loss) if targeted else loss
    shares = patch_shares(num_queries, p, rescale_schedule)
    first, propose = (_stripes, _squares) if threat.norm == "linf" else (_tiles, _pyramids)

    def begin(batch: Batch) -> State:
        clean = batch.images
        if clean.ndim != 4:
            raise ValueError(f"the Square attack needs images [B, H, W, C], not {clean.shape}")
        if clean.shape[1] <= 4 < min(clean.shape[2:]):
            raise ValueError(
                f"images {clean.shape} look like [B, C, H, W], the Square attack needs [B, H, W, "
                "C]: attack lambda x: function(x.transpose(0, 3, 1, 2)), and give images.transpose("
                "0, 2, 3, 1)"
            )
        zeros = jnp.zeros_like(clean, jnp.float32, shape=clean.shape[:1])
        return State(
            count=zeros.astype(jnp.int32),
            fooled=zeros.astype(bool),
            score=zeros - jnp.inf,
            adversarial=jax.vmap(lambda k, x: first(threat, k, x))(
                fold_in(batch.keys, num_queries), clean
            ),
        )

    def step(function: Callable[[Array], Any], batch: Batch, state: State) -> State:
        share = jnp.asarray(shares)[jnp.minimum(state.count, num_queries - 1)]
        keys = fold_in(batch.keys, state.count)
        changed = jax.vmap(lambda *a: propose(threat, *a))(
            keys, share, state.adversarial, batch.images
        )
        proposal = select(state.count == 0, state.adversarial, changed)
        outputs = function(proposal)
        value, fooled = loss.value(outputs, batch.labels), loss.fooled(outputs, batch.labels)
        value = jnp.where(jnp.isnan(value), -jnp.inf, value)
        better = ((value > state.score) & (fooled | ~state.fooled)) | (fooled & ~state.fooled)
        return State(
            count=state.count + 1,
            fooled=state.fooled | fooled,
            score=jnp.where(better, value, state.score),
            adversarial=select(better, proposal, state.adversarial),
        )

    identity = "square", p, name_of(loss), targeted, rescale_schedule
    return Stepwise(begin, step, num_queries, restarts, identity=identity)


def patch_shares(num_queries: int, p: float, rescale: bool) -> np.ndarray:
    """The share of pixels changed at each query, float32 [num_queries]."""
    queries = np.arange(num_queries)
    if rescale:
        queries = queries * 10_000 // num_queries
    halvings = np.sum(queries[:, None] > np.array(HALVINGS), axis=1)
    return (p / 2.0**halvings).astype(np.float32)


def _stripes(threat: Threat, key: Array, clean: Array) -> Array:
    """Vertical stripes of +-epsilon, each channel its own."""
    signs = jax.random.rademacher(key, (1, *clean.shape[1:]), clean.dtype)
    return project(threat, (clean + threat.epsilon * signs)[None], clean[None])[0]


def _squares(threat: Threat, key: Array, share: Array, images: Array, clean: Array) -> Array:
    """One square set to +-epsilon, each channel its own sign."""
    place, colour = jax.random.split(key)
    height, width, channels = clean.shape
    side = _side(share, height, width, 1)
    inside = _inside(_corner(place, side, height, width), side, height, width)
    signs = jax.random.rademacher(colour, (channels,), clean.dtype)
    edge = jnp.clip(clean + threat.epsilon * signs, threat.lower, threat.upper)
    return project(threat, jnp.where(inside[..., None], edge, images)[None], clean[None])[0]


def _tiles(threat: Threat, key: Array, clean: Array) -> Array:
    """A grid of pyramid pairs, five by five, each tile and channel with its own sign."""
    height, width, channels = clean.shape
    side = max(min(height, width) // 5, 1)
    rows, columns = (jnp.arange(n) - (n % side) // 2 for n in (height, width))
    grid = height // side, width // side
    sign_key, turn_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (*grid, channels), clean.dtype)
    turns = jax.random.bernoulli(turn_key, shape=grid)
    tile = [jnp.clip(a // side, 0, n - 1) for a, n in zip((rows, columns), grid, strict=True)]
    inside = [(a >= 0) & (a < side * n) for a, n in zip((rows, columns), grid, strict=True)]
    at = jnp.ix_(*tile)
    settings = jnp.asarray(side), height + width, _order(threat)
    patch = _pyramid_pair(rows % side, columns % side, *settings)
    turned = _pyramid_pair(columns % side, rows % side, *settings).T
    pattern = jnp.where(turns[at], turned, patch) * (inside[0][:, None] & inside[1])
    pattern = pattern * math.prod(grid) ** (1 / _order(threat))  # each tile's norm is 1
    return _into_ball(threat, pattern[..., None] * signs[at], clean)


def _pyramids(threat: Threat, key: Array, share: Array, images: Array, clean: Array) -> Array:
    """Moves the norm of one window of the perturbation into another (algorithm 3).

    In l1 a window gets more than its share, by the number of channels: the projection on the ball
    takes from all of them alike, and sets small changes to 0.
    """
    order = _order(threat)
    keys = jax.random.split(key, 4)
    height, width, channels = clean.shape
    side = _side(share, height, width, 3)
    side = jnp.minimum(side + (side % 2 == 0), _largest_odd(min(height, width)))
    corner = _corner(keys[0], side, height, width)
    into = _inside(corner, side, height, width)[..., None]
    source = _inside(_corner(keys[1], side, height, width), side, height, width)[..., None]
    delta = images - clean

    def power(x: Array) -> Array:
        return jnp.sum(jnp.abs(x) ** order, axis=(0, 1), keepdims=True)

    def norm(x: Array) -> Array:
        return power(x) ** (1 / order)

    offsets = [jnp.arange(n) - c for n, c in zip((height, width), corner, strict=True)]
    patch = _pyramid_pair(*offsets, side, height + width, order)
    turned = _pyramid_pair(*offsets[::-1], side, height + width, order).T
    patch = jnp.where(jax.random.bernoulli(keys[2]), turned, patch)[..., None]
    patch = patch * jax.random.rademacher(keys[3], (channels,), clean.dtype)
    patch = patch + delta * into / (norm(delta * into) + 1e-12)
    spare = jnp.maximum(threat.epsilon**order - jnp.sum(power(delta)), 0) / channels
    budget = (spare + power(delta * (into | source))) ** (1 / order)
    budget = budget * channels if order == 1 else budget
    patch = patch * into / (norm(patch * into) + 1e-12) * budget
    return _into_ball(threat, jnp.where(into, patch, jnp.where(source, 0, delta)), clean)


def _into_ball(threat: Threat, delta: Array, clean: Array) -> Array:
    """In l2 scaled to the sphere; in l1 to the sphere if inside, then projected on it."""
    order = _order(threat)
    length = jnp.sum(jnp.abs(delta) ** order) ** (1 / order)
    scale = threat.epsilon / jnp.maximum(length, 1e-12)
    delta = delta * (scale if order == 2 else jnp.maximum(scale, 1.0))
    return project(threat, (clean + delta)[None].astype(clean.dtype), clean[None])[0]


def _pyramid_pair(rows: Array, columns: Array, side: Array, largest: int, order: int) -> Array:
    """A pyramid on the upper half and a hole on the lower (eq. 2), norm 1, [rows, columns].

    Rows and columns are counted from the window's corner; outside of it is 0.
    """
    upper = side // 2
    pair = _pyramid(rows, columns, upper, side, largest, order)
    return pair - _pyramid(rows - upper, columns, side - upper, side, largest, order)


def _pyramid(
    rows: Array, columns: Array, height: Array, width: Array, largest: int, order: int
) -> Array:
    """Nested rectangles, the r-th from inside adding 1/r^2 (l1: 1/r^4); half of a norm of 1."""
    decay = {1: 4, 2: 2}[order]
    sums = np.cumsum([0.0, *(1 / np.arange(1, largest + 1, dtype=float) ** decay)])
    table = jnp.asarray(sums, jnp.float32)
    centre = height // 2, width // 2
    ring = jnp.maximum(jnp.abs(rows - centre[0])[:, None], jnp.abs(columns - centre[1]))
    value = table[jnp.maximum(*centre) + 1] - table[jnp.minimum(ring, largest)]
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    value = jnp.where(inside, jnp.maximum(value, 0), 0)
    return value / jnp.maximum((2 * jnp.sum(value**order)) ** (1 / order), 1e-12)


def _order(threat: Threat) -> int:
    return 1 if threat.norm == "l1" else 2


def _side(share: Array, height: int, width: int, least: int) -> Array:
    side = jnp.round(jnp.sqrt(share * height * width)).astype(jnp.int32)
    return jnp.clip(side, min(least, height, width), min(height, width))


def _largest_odd(number: int) -> int:
    return number if number % 2 else max(number - 1, 1)


def _corner(key: Array, side: Array, height: int, width: int) -> tuple[Array, Array]:
    row, column = jax.random.split(key)
    return (
        jax.random.randint(row, (), 0, height - side + 1),
        jax.random.randint(column, (), 0, width - side + 1),
    )


def _inside(corner: tuple[Array, Array], side: Array, height: int, width: int) -> Array:
    rows, columns = jnp.arange(height) - corner[0], jnp.arange(width) - corner[1]
    return ((rows >= 0) & (rows < side))[:, None] & (columns >= 0) & (columns < side)
