"""Runs a stepwise attack over many images in batches of one fixed size, always full.

A batch is a number of slots. After every few steps the images that are fooled, or through, leave
their slots to the next ones in the queue; an image that survives a target stays for the next. So
an image already fooled costs no further steps, and nothing is compiled twice.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from advmoe_jax.attacks.constraints import Threat, distance
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.stepwise import Batch, Stepwise, select

Array = jax.Array
LEAST_SLOTS = 16  # to compile for fewer costs more than it saves
Compile = Callable[[Callable[[Any, Any], Any]], Callable[[Any, Any], Any]]


class Rows(NamedTuple):
    """What the device gets: everything has one row per slot.

    Attributes:
        images, labels, wanted: as in ``Batch``.
        round: int32 [B], which target and restart the image is at.
        keys: key data of the image, uint32 [B, ...].
        fresh: bool [B], whether the round begins here.
        taken: bool [B], whether there is an image in the slot.
        state: the attack's.
    """

    images: Any
    labels: Any
    wanted: Any
    round: Any
    keys: Any
    fresh: Any
    taken: Any
    state: Any


class Task(NamedTuple):
    """The images of an evaluation, on the host; n rows.

    Attributes:
        images: float [n, ...].
        labels: int32 [n].
        ranked: int32 [n, K - 1], the wrong classes, most likely first.
        keys: key data, uint32 [n, ...].
    """

    images: np.ndarray
    labels: np.ndarray
    ranked: np.ndarray
    keys: np.ndarray


class Slots(NamedTuple):
    """What is under way: image numbers (-1: empty) and rounds, int32 [B]; the attack's state."""

    image: np.ndarray
    round: np.ndarray
    fresh: np.ndarray
    state: Any


class Outcome(NamedTuple):
    """Of the images that left their slots after a call of the device.

    Attributes:
        image: int [m], which they are.
        fooled: bool [m].
        adversarial: [m, ...].
        flat: int, how many images began where the loss has no gradient.
        progress: float, rounds done so far by the images still under way.
        seconds: what the call took.
        slots: what is under way now.
    """

    image: np.ndarray
    fooled: np.ndarray
    adversarial: np.ndarray
    flat: int
    progress: float
    seconds: float
    slots: Slots


def device_function(steps: Stepwise, chunk: int, impl: str) -> Callable[[Any, Rows], Any]:
    """(function, rows) -> state after up to ``chunk`` steps, or fewer when every image is done."""

    def run(function: Callable[..., Any], rows: Rows) -> Any:
        keys = fold_in(jax.random.wrap_key_data(rows.keys, impl=impl), rows.round)
        restart = rows.round % steps.restarts
        clean = steps.look(function, rows.images) if steps.look else None
        batch = Batch(rows.images, rows.labels, rows.wanted, restart, keys, clean)
        state = select(rows.fresh, steps.begin(batch), rows.state)

        def stopped(state: Any) -> Array:
            return ~rows.taken | state.fooled | (state.count >= steps.num_steps)

        def going_on(carry: tuple[Array, Any]) -> Array:
            return (carry[0] < chunk) & ~jnp.all(stopped(carry[1]))

        def step(carry: tuple[Array, Any]) -> tuple[Array, Any]:
            state = carry[1]
            return carry[0] + 1, select(stopped(state), state, steps.step(function, batch, state))

        return lax.while_loop(going_on, step, (jnp.zeros((), jnp.int32), state))[1]

    return run


def size_for(images: int, batch_size: int, multiple: int = 1) -> int:
    """The batch size up to ``batch_size`` that wastes fewest slots on so many images.

    As many batches as with the full size, each as small as will do, in eighths of the full size
    (in steps of ``LEAST_SLOTS`` if that is more): a few different sizes, so that what was compiled
    for one evaluation serves the next.
    """
    eighth = max(max(batch_size // 8, LEAST_SLOTS) // multiple, 1) * multiple
    batches = max(-(-images // batch_size), 1)
    needed = max(-(-images // batches), 1)
    return min(-(-needed // eighth) * eighth, batch_size)


def empty(steps: Stepwise, task: Task, size: int, impl: str) -> Slots:
    """Slots with nothing in them."""
    images = jax.ShapeDtypeStruct((size, *task.images.shape[1:]), task.images.dtype)
    ints = jax.ShapeDtypeStruct((size,), jnp.int32)

    def begin(images: Array, labels: Array, keys: Array) -> Any:
        keys = jax.random.wrap_key_data(keys, impl=impl)
        return steps.begin(Batch(images, labels, labels, labels, keys))

    keys = jax.ShapeDtypeStruct((size, *task.keys.shape[1:]), task.keys.dtype)
    state = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(begin, images, ints, keys)
    )
    none = np.full(size, -1, np.int32)
    return Slots(none, np.zeros_like(none), np.zeros(size, bool), state)


def attack_packed(
    steps: Stepwise,
    compiled: Callable[[Any, Rows], Any],
    function: Any,
    task: Task,
    queue: np.ndarray,
    slots: Slots,
) -> Any:
    """Yields an ``Outcome`` after every call of the device, until queue and slots are empty.

    Args:
        steps: the attack.
        compiled: its ``device_function``, compiled.
        function: what is attacked, a ``jax.tree_util.Partial``.
        task: all images.
        queue: int [m], images that wait.
        slots: images under way.
    """
    queue = list(queue[::-1])
    while True:
        slots = _refill(slots, queue)
        taken = slots.image >= 0
        if not taken.any():
            return
        began = time.perf_counter()
        state = compiled(function, _rows(steps, task, slots))
        count, fooled = np.asarray(state.count), np.asarray(state.fooled) & taken
        seconds = time.perf_counter() - began
        through = taken & ~fooled & (count >= steps.num_steps)
        last = slots.round + 1 >= steps.rounds
        left = fooled | (through & last)
        again = through & ~last
        flat = 0
        if hasattr(state, "flat"):
            flat = int(np.sum(np.asarray(state.flat) & left & (slots.round == 0)))
            flat += int(np.sum(np.asarray(state.flat) & again & (slots.round == 0)))
        gone = slots.image[left]
        adversarial = np.asarray(state.adversarial)[left] if left.any() else task.images[:0]
        slots = Slots(
            np.where(left, -1, slots.image).astype(np.int32),
            np.where(again, slots.round + 1, np.where(left, 0, slots.round)).astype(np.int32),
            again,
            state,
        )
        under_way = slots.image >= 0
        done = slots.round + np.where(again, 0, count / steps.num_steps)
        progress = float(np.sum(done * under_way)) / steps.rounds
        yield Outcome(gone, fooled[left], adversarial, flat, progress, seconds, slots)


def _refill(slots: Slots, queue: list[int]) -> Slots:
    image, fresh = slots.image.copy(), slots.fresh.copy()
    for slot in np.flatnonzero(image < 0)[: len(queue)]:
        image[slot], fresh[slot] = queue.pop(), True
    return slots._replace(image=image, fresh=fresh)


def _rows(steps: Stepwise, task: Task, slots: Slots) -> Rows:
    at = np.maximum(slots.image, 0)
    target = np.minimum(slots.round // steps.restarts, task.ranked.shape[1] - 1)
    return Rows(
        task.images[at],
        task.labels[at],
        task.ranked[at, target],
        slots.round,
        task.keys[at],
        slots.fresh,
        slots.image >= 0,
        slots.state,
    )


def in_batches(
    compiled: Callable[..., Any], arrays: tuple[np.ndarray, ...], size: int
) -> np.ndarray:
    """``compiled`` over the rows of the arrays, ``size`` at a time; the last ones are padded."""
    rows = len(arrays[0])
    results = []
    for begin in range(0, rows, size):
        at = np.minimum(np.arange(begin, begin + size), rows - 1)
        results.append(np.asarray(compiled(*(a[at] for a in arrays))))
    return np.concatenate(results)[:rows]


def confirmed(
    threat: Threat,
    function: Callable[[Any], Any],
    images: np.ndarray,
    clean: np.ndarray,
    labels: np.ndarray,
    size: int,
) -> np.ndarray:
    """Whether images are what an attack says they are, bool [n].

    Looked at once more by the function as it was given, ``size`` at a time: misclassified, in the
    ball around the clean ones, and in the pixel range.
    """
    logits = in_batches(function, (images,), size)
    valid = np.argmax(logits, axis=1) != labels
    far = np.asarray(distance(threat, images, clean))
    slack = 1e-5 * (threat.upper - threat.lower)
    valid &= far <= float(threat.epsilon) * (1 + 1e-5) + slack
    pixels = images.reshape(len(images), -1).astype(np.float32)
    return valid & (pixels.min(1) >= threat.lower) & (pixels.max(1) <= threat.upper)


def shared(factory: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """A cached factory of programs, or the same without its cache.

    What is compiled for ``function`` serves others that differ in the arrays of their ``Partial``
    alone. The arrays of a closure are constants in what is compiled: it must be traced anew at
    every call, for they may be others by then.

    Args:
        factory: wrapped by ``functools.lru_cache``.
        function: what is attacked, as ``as_partial`` returns it.
    """
    return factory if jax.tree.leaves(function) else factory.__wrapped__


def as_partial(function: Callable[..., Any]) -> Any:
    """A pytree: the arrays of a ``jax.tree_util.Partial`` stay arguments of what is compiled.

    A NamedTuple of functions that can be called itself, such as ``routing.Routed``, stays one.
    """
    if isinstance(function, tuple):
        return type(function)(*map(as_partial, function))
    is_partial = isinstance(function, jax.tree_util.Partial | partial)
    if is_partial and not isinstance(function, jax.tree_util.Partial):
        return jax.tree_util.Partial(function.func, *function.args, **function.keywords)
    return function if is_partial else jax.tree_util.Partial(function)
