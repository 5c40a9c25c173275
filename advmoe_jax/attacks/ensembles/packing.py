"""Runs a stepwise attack over many images in batches of one fixed size, always full.

A batch is a number of slots. After every few steps the images that are fooled, or through, leave
their slots to the next ones in the queue; an image that survives a target stays for the next. So
an image already fooled costs no further steps, and nothing is compiled twice.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, UInt32

from advmoe_jax.attacks.ensembles.programs import Device
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.loops import repeat_while
from advmoe_jax.attacks.stepwise import Batch, Stepwise, select
from advmoe_jax.parallel import whole
from advmoe_jax.types import Array

# Calls of the device per round: often enough to send fooled images away, and to save.
CALLS = 10
LONGEST_CALL = 100


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
    """The images that one attack runs on, on the host.

    Attributes:
        images: clean.
        labels: of the images.
        ranked: the wrong classes, most likely first.
        keys: key data of the images.
        impl: the name of the keys' PRNG.
    """

    images: Float[np.ndarray, "images ..."]
    labels: Int[np.ndarray, " images"]
    ranked: Int[np.ndarray, "images wrong"]
    keys: UInt32[np.ndarray, "images ..."]
    impl: str


class Slots(NamedTuple):
    """What is under way.

    Attributes:
        image: the number of the image in the slot; -1: none.
        round: which target and restart it is at.
        fresh: whether the round begins with the next call.
        state: the attack's, a row per slot.
    """

    image: Int[np.ndarray, " slots"]
    round: Int[np.ndarray, " slots"]
    fresh: Bool[np.ndarray, " slots"]
    state: Any


class Outcome(NamedTuple):
    """Of the images that left their slots after a call of the device.

    Attributes:
        image: which they are.
        fooled: whether the attack succeeded.
        adversarial: what it found.
        flat: how many images began where the loss has no gradient.
        under_way: rounds done so far by the images that are still in slots, all together.
        seconds: what the call took.
        slots: what is under way now.
    """

    image: Int[np.ndarray, " gone"]
    fooled: Bool[np.ndarray, " gone"]
    adversarial: Float[np.ndarray, "gone ..."]
    flat: int
    under_way: float
    seconds: float
    slots: Slots


class Advance(NamedTuple):
    """A body: (function, rows) -> states after up to ``chunk`` more steps.

    They are fewer when every image is done before: of this device, and of those that it shares
    the function with over mesh axes.
    """

    steps: Stepwise
    chunk: int
    impl: str
    shared_axes: tuple[str, ...] = ()

    def __call__(self, function: Any, rows: Rows) -> Any:
        """What runs on the device."""
        steps = self.steps
        keys = fold_in(jax.random.wrap_key_data(rows.keys, impl=self.impl), rows.round)
        restart = rows.round % steps.restarts
        clean = steps.look(function, rows.images) if steps.look else None
        batch = Batch(rows.images, rows.labels, rows.wanted, restart, keys, clean)
        state = select(rows.fresh, steps.begin(batch), rows.state)

        def stopped(state: Any) -> Array:
            return ~rows.taken | state.fooled | (state.count >= steps.num_steps)

        def is_open(state: Any) -> Array:
            here = ~jnp.all(stopped(state))
            return lax.pmax(here, self.shared_axes) if self.shared_axes else here

        def going_on(carry: tuple[Array, Array, Any]) -> Array:
            return (carry[0] < self.chunk) & carry[1]

        def step(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            state = carry[2]
            state = select(stopped(state), state, steps.step(function, batch, state))
            return carry[0] + 1, is_open(state), state

        start = (jnp.zeros((), jnp.int32), is_open(state), state)
        return repeat_while(going_on, step, start)[2]


def empty_slots(steps: Stepwise, task: Task, size: int) -> Slots:
    """Slots with nothing in them."""
    images = jax.ShapeDtypeStruct((size, *task.images.shape[1:]), task.images.dtype)
    ints = jax.ShapeDtypeStruct((size,), jnp.int32)

    def begin(images: Array, labels: Array, keys: Array) -> Any:
        keys = jax.random.wrap_key_data(keys, impl=task.impl)
        return steps.begin(Batch(images, labels, labels, labels, keys))

    keys = jax.ShapeDtypeStruct((size, *task.keys.shape[1:]), task.keys.dtype)
    state = jax.tree.map(
        lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(begin, images, ints, keys)
    )
    none = np.full(size, -1, np.int32)
    return Slots(none, np.zeros_like(none), np.zeros(size, bool), state)


def attack_packed(
    steps: Stepwise,
    device: Device,
    task: Task,
    queue: Int[np.ndarray, " waiting"],
    slots: Slots,
) -> Iterator[Outcome]:
    """Yields the outcome of every call of the device, until queue and slots are empty.

    Args:
        steps: the attack.
        device: what is attacked, and where.
        task: all images.
        queue: images that wait.
        slots: images under way.
    """
    chunk = min(-(-steps.num_steps // CALLS), LONGEST_CALL)
    body = Advance(steps, chunk, task.impl, device.shared_axes)
    waiting = list(queue[::-1])
    while True:
        slots = _refill(slots, waiting)
        if not np.any(slots.image >= 0):
            return
        began = time.perf_counter()
        state = jax.block_until_ready(device.run(body, _rows(steps, task, slots)))
        seconds = time.perf_counter() - began
        outcome = _outcome(steps, task, slots, state, seconds)
        slots = outcome.slots
        yield outcome


def _outcome(steps: Stepwise, task: Task, slots: Slots, state: Any, seconds: float) -> Outcome:
    """Who leaves, who goes on to the next round, and who stays where it is."""
    taken = slots.image >= 0
    count, fooled = whole((state.count, state.fooled))
    fooled = fooled & taken
    through = taken & ~fooled & (count >= steps.num_steps)
    last = slots.round + 1 >= steps.rounds
    left = fooled | (through & last)
    again = through & ~last
    flat = 0
    if hasattr(state, "flat"):
        flat = int(np.sum(whole(state.flat) & (left | again) & (slots.round == 0)))
    after = Slots(
        np.where(left, -1, slots.image).astype(np.int32),
        np.where(again, slots.round + 1, np.where(left, 0, slots.round)).astype(np.int32),
        again,
        state,
    )
    done = after.round + np.where(again, 0, count / steps.num_steps)
    under_way = float(np.sum(done * (after.image >= 0))) / steps.rounds
    adversarial = whole(state.adversarial)[left] if left.any() else task.images[:0]
    return Outcome(slots.image[left], fooled[left], adversarial, flat, under_way, seconds, after)


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
