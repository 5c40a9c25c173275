"""The training loop: epochs, validation, progress, logging, checkpoints. It knows no loss.

Everything a run depends on is its state and what follows from the seed and the step number, so a
run that was stopped anywhere and goes on ends in the same bits as one that never stopped.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int, Key

from advmoe_jax.data.batch import (
    BatchRecipe,
    DeviceData,
    Feed,
    Reader,
    epoch_order,
    training_batch,
)
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import distribute, parallel, replicate, state_specs
from advmoe_jax.routing.measures import collapse_warnings
from advmoe_jax.training.checkpoint import Checkpointer
from advmoe_jax.training.log import RunLog, Shown
from advmoe_jax.training.methods import Step
from advmoe_jax.training.preemption import stop_requests
from advmoe_jax.training.progress import progress_bar
from advmoe_jax.training.state import TrainState, evaluated
from advmoe_jax.types import Array, Tree

# Metrics are read this many steps late, so that the device always has work queued.
STEPS_IN_FLIGHT = 2


class Waiting(NamedTuple):
    """Of early stopping: the best validation metric, and epochs since then."""

    best: Float[Array, ""]
    epochs: Int[Array, ""]


class Carry(NamedTuple):
    """What a checkpoint holds: the state, and the sums of the current epoch's metrics.

    ``waiting`` is None, and leaves no trace, in a run that does not stop early.
    """

    state: TrainState
    totals: Tree
    waiting: Waiting | None = None


class Task(NamedTuple):
    """What to train.

    Attributes:
        step: of the method, with the mesh's axes as its axis name.
        feed: the training images, and how batches are made of them.
        validate: (params, stats, epoch) -> metrics of the validation split, as they are logged. If
            the state keeps an average of the weights, it is the average that is validated.
        selected_by: the validation metric that chooses the best checkpoint.
        num_epochs: of the whole run.
        order_key: the epochs' orders follow from it.
        step_key: the steps' randomness follows from it.
        expert_parameters: of the network, see ``parallel.state_specs``.
        patience: epochs without a better ``selected_by`` after which the run ends; 0: none.
        show: (params, stats, epoch) -> what is shown of them besides, or None; the first process
            alone calls it.
    """

    step: Step
    feed: Feed
    validate: Callable[[Tree, Tree, int], Tree]
    selected_by: str
    num_epochs: int
    order_key: Key[Array, ""]
    step_key: Key[Array, ""]
    expert_parameters: tuple[str, ...] = ()
    patience: int = 0
    show: Callable[[Tree, Tree, int], Shown | None] = lambda params, stats, epoch: None

    @property
    def program(self) -> "Program":
        """What its compiled step follows from."""
        feed = self.feed
        return Program(
            *(self.step, feed.steps_per_epoch, feed.recipe, feed.reader, feed.spec),
            self.expert_parameters,
        )


class Program(NamedTuple):
    """All that a compiled step follows from, but for its arguments; see ``Task`` and ``Feed``.

    Tasks that differ in images and keys alone have equal programs, and share what is compiled.
    """

    step: Step
    steps_per_epoch: int
    recipe: BatchRecipe
    reader: Reader
    spec: PartitionSpec
    expert_parameters: tuple[str, ...] = ()


class Stopped(Exception):
    """SIGTERM or SIGINT came; the state is saved."""

    def __init__(self, by: signal.Signals = signal.SIGTERM) -> None:
        super().__init__(f"stopped by {by.name}; saved: the same command goes on")
        self.by = by


class Diverged(UserError):
    """A loss or a parameter is not finite; the last good checkpoint is untouched."""


def train(
    task: Task,
    state: TrainState,
    mesh: Mesh,
    checkpointer: Checkpointer,
    open_log: Callable[[int], RunLog],
) -> TrainState:
    """Trains to the end, from the last checkpoint if there is one.

    Args:
        task: what to train.
        state: the state before the first step; its buffers are given up.
        mesh: the devices.
        checkpointer: of the run's directory.
        open_log: makes the log, given the number of completed steps.

    Returns:
        The state after the last step.

    Raises:
        Stopped: on SIGTERM or SIGINT, after saving.
        Diverged: if a loss or a parameter is not finite; the last good checkpoint is untouched.
    """
    carry = first_carry(task, state, mesh)
    if (restored := checkpointer.restore_latest(carry)) is not None:
        carry = restored[1]
    start = int(carry.state.step)
    log = open_log(start)
    try:
        with stop_requests() as stop_requested:
            loop = _Loop(task, mesh, checkpointer, log, stop_requested, saved_step=start)
            return loop.run(carry)
    finally:
        log.close()


def first_carry(task: Task, state: TrainState, mesh: Mesh) -> Carry:
    """The carry before the first step, on all devices: the state, and metrics of zero."""
    program = task.program

    def metrics_of(
        state: TrainState, data: DeviceData, order: Int[Array, " n"], key: Key[Array, ""]
    ) -> Tree:
        return _step_on_device(program, mesh, state, data, order, key)[1]

    order = jax.ShapeDtypeStruct((task.feed.images_per_epoch,), jnp.int32)
    mapped = parallel(metrics_of, mesh, in_specs=_in_specs(program, mesh, state))
    shapes = jax.eval_shape(mapped, state, task.feed.shapes, order, task.step_key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    waiting = Waiting(jnp.float32(-jnp.inf), jnp.int32(0)) if task.patience else None
    carry = Carry(state, zeros, waiting)
    return distribute(carry, state_specs(carry, task.expert_parameters, mesh), mesh)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
    program: Program,
    mesh: Mesh,
    carry: Carry,
    data: DeviceData,
    order: Int[Array, " n"],
    key: Key[Array, ""],
) -> tuple[Carry, Tree]:
    """One training step: the batch is taken and augmented, attacked and learned from.

    Args:
        program: of the task.
        mesh: the devices.
        carry: its buffers are given up.
        data: what the step reads, of the task's feed.
        order: the epoch's order.
        key: the task's ``step_key``.

    Returns:
        The carry after the step, and the step's metrics.
    """

    def on_device(
        carry: Carry, data: DeviceData, order: Int[Array, " n"], key: Key[Array, ""]
    ) -> tuple[Carry, Tree]:
        first = carry.state.step % program.steps_per_epoch == 0
        state, metrics = _step_on_device(program, mesh, carry.state, data, order, key)
        totals = jax.tree.map(lambda t, m: jnp.where(first, m, t + m), carry.totals, metrics)
        return Carry(state, totals, carry.waiting), metrics

    in_specs = _in_specs(program, mesh, carry)
    out_specs = (in_specs[0], PartitionSpec())
    mapped = parallel(on_device, mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(carry, data, order, key)


def _in_specs(program: Program, mesh: Mesh, state: Any) -> tuple[Any, ...]:
    everywhere = PartitionSpec()
    spread = state_specs(state, program.expert_parameters, mesh)
    return (spread, program.spec, everywhere, everywhere)


def _step_on_device(
    program: Program,
    mesh: Mesh,
    state: TrainState,
    data: DeviceData,
    order: Int[Array, " n"],
    key: Key[Array, ""],
) -> tuple[TrainState, Tree]:
    images, labels, keys = training_batch(
        program.reader,
        data,
        order,
        state.step % program.steps_per_epoch,
        jax.random.fold_in(key, state.step),
        program.recipe,
        mesh.axis_names,
    )
    return program.step(state, images, labels, keys)


class _Loop:
    """The host's side of a run."""

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        checkpointer: Checkpointer,
        log: RunLog,
        stop_requested: Callable[[], signal.Signals | None],
        saved_step: int,
    ) -> None:
        self._task, self._checkpointer, self._log = task, checkpointer, log
        self._stop_requested, self._saved_step = stop_requested, saved_step
        self._steps_per_epoch = task.feed.steps_per_epoch
        self._train_step = partial(train_step, task.program, mesh)
        self._compile_seconds: float | None = None
        self._replicate = lambda tree: replicate(tree, mesh)

    def run(self, carry: Carry) -> TrainState:
        """Trains from ``carry`` to the end, a stop or the end of patience: the last state."""
        task, step, count = self._task, int(carry.state.step), self._steps_per_epoch
        if step == count * task.num_epochs or self._is_patience_over(carry):
            self._log.say(f"trained already, {step} steps")
        elif step:
            self._log.say(f"going on from step {step}, epoch {step // count + 1}")
        total = count * task.num_epochs
        bar = progress_bar(
            self._log.console,
            total=total,
            completed=step,
            batch_size=task.feed.recipe.batch_size,
            enabled=self._log.enabled,
        )
        read = task.feed.batches(task.order_key, task.step_key, step, total)
        with bar as advance, closing(read) as inputs:
            for epoch in range(step // count, task.num_epochs):
                if self._is_patience_over(carry):
                    break
                started = time.perf_counter()
                first = step
                carry, step = self._train_epoch(carry, step, epoch, inputs, advance)
                seconds = time.perf_counter() - started
                carry = self._end_epoch(carry, step, epoch, seconds, step - first)
                if by := self._stop_requested():
                    self._checkpointer.wait()
                    raise Stopped(by)
        self._checkpointer.wait()
        return carry.state

    def _train_epoch(
        self,
        carry: Carry,
        step: int,
        epoch: int,
        inputs: Iterator[DeviceData],
        advance: Callable[[Tree], None],
    ) -> tuple[Carry, int]:
        task, count = self._task, self._steps_per_epoch
        order = epoch_order(task.order_key, epoch, task.feed.images_per_epoch)
        order = self._replicate(order)
        first = epoch * count
        in_flight: deque[tuple[int, Tree]] = deque()
        for done, data in enumerate(islice(inputs, first + count - step), start=step + 1):
            called = time.perf_counter()
            carry, metrics = self._train_step(carry, data, order, task.step_key)
            if self._compile_seconds is None:  # the call returns once the step is compiled
                self._compile_seconds = time.perf_counter() - called
                self._log.say(f"step compiled in {self._compile_seconds:.1f} s")
            in_flight.append((done, metrics))
            if len(in_flight) > STEPS_IN_FLIGHT:
                advance(self._checked(*in_flight.popleft()))
            if done % count and (by := self._stop_requested()):
                self._save(carry, done, None)
                self._checkpointer.wait()
                raise Stopped(by)
        for late in in_flight:
            advance(self._checked(*late))
        return carry, first + count

    def _end_epoch(self, carry: Carry, step: int, epoch: int, seconds: float, steps: int) -> Carry:
        count = self._steps_per_epoch
        train = jax.tree.map(lambda x: (x / count).tolist(), jax.device_get(carry.totals))
        validation = self._task.validate(*evaluated(carry.state), epoch)
        entry = {
            "epoch": epoch + 1,
            "step": step,
            "seconds": round(seconds, 3),
            "compile_seconds": round(self._compile_seconds or 0.0, 3),
            "images_per_second": round(steps * self._task.feed.recipe.batch_size / seconds, 1),
            "train": train,
            "validation": validation,
            "warnings": collapse_warnings(train.get("routing"), f"in epoch {epoch + 1}"),
        }
        # The line first: a line without its checkpoint is removed and written anew on resuming,
        # a checkpoint without its line would leave a gap.
        self._log.epoch(entry, self._task.num_epochs)
        if self._log.enabled and (shown := self._task.show(*evaluated(carry.state), epoch)):
            self._log.show(shown, step)
        metric = validation[self._task.selected_by]
        carry = self._wait(carry, metric)
        self._save(carry, step, metric)
        if self._is_patience_over(carry) and epoch + 1 < self._task.num_epochs:
            self._log.say(
                f"stopped early: no better validation {self._task.selected_by} than "
                f"{float(carry.waiting.best):.3f} for {self._task.patience} epochs"
            )
        return carry

    def _wait(self, carry: Carry, metric: float) -> Carry:
        """The carry with the epoch's metric taken into account."""
        if carry.waiting is None:
            return carry
        best, epochs = jax.device_get(carry.waiting)
        metric = np.float32(metric)
        improved = metric > best
        waiting = Waiting(metric if improved else best, np.int32(0 if improved else epochs + 1))
        return carry._replace(waiting=self._replicate(waiting))

    def _is_patience_over(self, carry: Carry) -> bool:
        return carry.waiting is not None and int(carry.waiting.epochs) >= self._task.patience

    def _save(self, carry: Carry, step: int, metric: float | None) -> None:
        if not _all_finite(carry.state):
            raise self._diverged("a parameter", step)
        self._checkpointer.save(step, carry, metric)
        self._saved_step = step

    def _checked(self, step: int, metrics: Tree) -> Tree:
        """The metrics of a step on the host, all finite."""
        metrics = jax.device_get(metrics)
        for name in ("loss", "router_loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise self._diverged(f"{name} ({metrics[name]})", step)
        return metrics

    def _diverged(self, what: str, step: int) -> Diverged:
        part = "router" if what.startswith("router") else "experts"
        last = f"the checkpoint of step {self._saved_step} is intact"
        return Diverged(
            f"{what} is not finite at step {step}: training has diverged; "
            f"{last if self._saved_step else 'nothing was saved yet'}. Try a lower "
            f"optimizer.{part}.learning_rate or some optimizer.{part}.warmup_epochs, in a new "
            "workdir"
        )


@jax.jit
def _all_finite(tree: Any) -> Bool[Array, ""]:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
