"""The training loop: epochs, validation, progress, logging, checkpoints. It knows no loss.

Everything a run depends on is its state and what follows from the seed and the step number, so a
run that was stopped anywhere and goes on ends in the same bits as one that never stopped.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from advmoe_jax.data import pipeline
from advmoe_jax.data.stream import Stream
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import DATA_AXIS, parallel, replicate
from advmoe_jax.routing.measures import collapse_warnings
from advmoe_jax.training.checkpoint import Checkpointer
from advmoe_jax.training.log import RunLog
from advmoe_jax.training.methods import Step
from advmoe_jax.training.state import TrainState, evaluated

Array = jax.Array
Tree = dict[str, Any]
# Metrics are read this many steps late, so that the device always has work queued.
STEPS_IN_FLIGHT = 2


class Waiting(NamedTuple):
    """Of early stopping: the best validation metric (float32), and epochs since then (int32)."""

    best: Array
    epochs: Array


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
        step: of the method, with axis name ``DATA_AXIS``.
        data: the training split, and the mixture's extra images; on the device, or streamed.
        validate: (params, stats, epoch) -> metrics of the validation split, as they are logged. If
            the state keeps an average of the weights, it is the average that is validated.
        selected_by: the validation metric that chooses the best checkpoint.
        batch_size: over all devices.
        num_epochs: of the whole run.
        crop_padding: of the augmentation, in pixels.
        flip: of the augmentation.
        order_key: the epochs' orders follow from it.
        step_key: the steps' randomness follows from it.
        mixture: extra images and CutMix.
        patience: epochs without a better ``selected_by`` after which the run ends; 0: none.
    """

    step: Step
    data: pipeline.DeviceData | Stream
    validate: Callable[[Tree, Tree, int], Tree]
    selected_by: str
    batch_size: int
    num_epochs: int
    crop_padding: int
    flip: bool
    order_key: Array
    step_key: Array
    mixture: pipeline.Mixture = pipeline.Mixture()
    patience: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training split."""
        return self.mixture.steps_per_epoch(self.data, self.batch_size)

    @property
    def _program(self) -> "_Program":
        return _Program(
            self.step,
            self.steps_per_epoch,
            self.batch_size,
            self.crop_padding,
            self.flip,
            self.mixture,
            isinstance(self.data, Stream),
        )


class _Program(NamedTuple):
    """All that a compiled step follows from, but for its arguments; see ``Task``."""

    step: Step
    steps_per_epoch: int
    batch_size: int
    crop_padding: int
    flip: bool
    mixture: pipeline.Mixture
    is_streamed: bool


class Stopped(Exception):
    """SIGTERM came; the state is saved."""


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
        Stopped: on SIGTERM, after saving.
        Diverged: if a loss or a parameter is not finite; the last good checkpoint is untouched.
    """
    waiting = Waiting(jnp.float32(-jnp.inf), jnp.int32(0)) if task.patience else None
    carry = replicate(Carry(state, _zero_metrics(task, state, mesh), waiting), mesh)
    if (restored := checkpointer.restore_latest(carry)) is not None:
        carry = restored[1]
    start = int(carry.state.step)
    log = open_log(start)
    try:
        with _sigterm() as stop_requested:
            loop = _Loop(task, mesh, checkpointer, log, stop_requested, saved_step=start)
            return loop.run(carry)
    finally:
        log.close()


def compile_step(
    task: Task, mesh: Mesh
) -> Callable[[Carry, pipeline.DeviceData, Array, Array], tuple[Carry, Tree]]:
    """One call per training step: (carry, data, order, key) -> (carry, metrics).

    The batch is gathered and augmented, attacked and learned from in one compiled function; the
    carry's buffers are donated. ``data`` is the whole split, or a batch if it is streamed. Tasks
    that differ in data and keys alone share one function.
    """
    return _compile_step(task._program, mesh)


@lru_cache(maxsize=16)
def _compile_step(program: _Program, mesh: Mesh) -> Callable[..., tuple[Carry, Tree]]:
    def one_step(
        carry: Carry, data: pipeline.DeviceData, order: Array, key: Array
    ) -> tuple[Carry, Tree]:
        first = carry.state.step % program.steps_per_epoch == 0
        state, metrics = _step_on_device(program, carry.state, data, order, key)
        totals = jax.tree.map(lambda t, m: jnp.where(first, m, t + m), carry.totals, metrics)
        return Carry(state, totals, carry.waiting), metrics

    return parallel(one_step, mesh, in_specs=_in_specs(program), donate=(0,))


def _in_specs(program: _Program) -> tuple[PartitionSpec, ...]:
    everywhere = PartitionSpec()
    of_data = PartitionSpec(DATA_AXIS) if program.is_streamed else everywhere
    return (everywhere, of_data, everywhere, everywhere)


def _step_on_device(
    program: _Program, state: TrainState, data: pipeline.DeviceData, order: Array, key: Array
) -> tuple[TrainState, Tree]:
    images, labels, keys = pipeline.training_batch(
        data,
        order,
        state.step % program.steps_per_epoch,
        program.batch_size,
        jax.random.fold_in(key, state.step),
        program.crop_padding,
        program.flip,
        DATA_AXIS,
        program.mixture,
        streamed=program.is_streamed,
    )
    return program.step(state, images, labels, keys)


def _zero_metrics(task: Task, state: TrainState, mesh: Mesh) -> Tree:
    program = task._program

    def metrics_of(state: TrainState, data: pipeline.DeviceData, order: Array, key: Array) -> Tree:
        return _step_on_device(program, state, data, order, key)[1]

    order = jax.ShapeDtypeStruct((task.mixture.own_images(task.data),), jnp.int32)
    mapped = parallel(metrics_of, mesh, in_specs=_in_specs(program))
    data = task.data.batch_shapes() if isinstance(task.data, Stream) else task.data
    shapes = jax.eval_shape(mapped, state, data, order, task.step_key)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


class _Loop:
    """The host's side of a run."""

    def __init__(
        self,
        task: Task,
        mesh: Mesh,
        checkpointer: Checkpointer,
        log: RunLog,
        stop_requested: Callable[[], bool],
        saved_step: int,
    ) -> None:
        self._task, self._checkpointer, self._log = task, checkpointer, log
        self._stop_requested, self._saved_step = stop_requested, saved_step
        self._train_step = compile_step(task, mesh)
        self._compile_seconds: float | None = None
        self._order = jax.jit(
            lambda epoch: pipeline.permutation(
                jax.random.fold_in(task.order_key, epoch), task.mixture.own_images(task.data)
            )
        )
        self._finite = jax.jit(
            lambda tree: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in _floats(tree)]))
        )
        self._replicate = lambda tree: replicate(tree, mesh)

    def run(self, carry: Carry) -> TrainState:
        task, step = self._task, int(carry.state.step)
        if step == task.steps_per_epoch * task.num_epochs or self._is_patience_over(carry):
            self._log.say(f"trained already, {step} steps")
        elif step:
            self._log.say(f"going on from step {step}, epoch {step // task.steps_per_epoch + 1}")
        with _progress(self._log, task, step) as advance:
            for epoch in range(step // task.steps_per_epoch, task.num_epochs):
                if self._is_patience_over(carry):
                    break
                started = time.perf_counter()
                first = step
                carry, step = self._train_epoch(carry, step, epoch, advance)
                seconds = time.perf_counter() - started
                carry = self._end_epoch(carry, step, epoch, seconds, step - first)
                if self._stop_requested():
                    self._checkpointer.wait()
                    raise Stopped
        self._checkpointer.wait()
        return carry.state

    def _train_epoch(
        self, carry: Carry, step: int, epoch: int, advance: Callable[[Tree], None]
    ) -> tuple[Carry, int]:
        order = self._replicate(self._order(epoch))
        in_flight: deque[tuple[int, Tree]] = deque()
        for done, data in enumerate(self._inputs(step, epoch, order), start=step + 1):
            called = time.perf_counter()
            carry, metrics = self._train_step(carry, data, order, self._task.step_key)
            if self._compile_seconds is None:  # the call returns once the step is compiled
                self._compile_seconds = time.perf_counter() - called
                self._log.say(f"step compiled in {self._compile_seconds:.1f} s")
            in_flight.append((done, metrics))
            if len(in_flight) > STEPS_IN_FLIGHT:
                advance(self._checked(*in_flight.popleft()))
            if done % self._task.steps_per_epoch and self._stop_requested():
                self._save(carry, done, None)
                self._checkpointer.wait()
                raise Stopped
        for late in in_flight:
            advance(self._checked(*late))
        return carry, (epoch + 1) * self._task.steps_per_epoch

    def _inputs(self, step: int, epoch: int, order: Array) -> Iterator[pipeline.DeviceData]:
        """What each step of the rest of an epoch reads."""
        task, count = self._task, self._task.steps_per_epoch
        first = epoch * count
        if isinstance(task.data, Stream):
            return task.data.batches(order, task.step_key, first, step - first, count)
        return repeat(task.data, first + count - step)

    def _end_epoch(self, carry: Carry, step: int, epoch: int, seconds: float, steps: int) -> Carry:
        count = self._task.steps_per_epoch
        train = jax.tree.map(lambda x: (x / count).tolist(), jax.device_get(carry.totals))
        validation = self._task.validate(*evaluated(carry.state), epoch)
        entry = {
            "epoch": epoch + 1,
            "step": step,
            "seconds": round(seconds, 3),
            "compile_seconds": round(self._compile_seconds or 0.0, 3),
            "images_per_second": round(steps * self._task.batch_size / seconds, 1),
            "train": train,
            "validation": validation,
            "warnings": collapse_warnings(train.get("routing"), f"in epoch {epoch + 1}"),
        }
        # The line first: a line without its checkpoint is removed and written anew on resuming,
        # a checkpoint without its line would leave a gap.
        self._log.epoch(entry, self._task.num_epochs)
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
        if not self._finite(carry.state):
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


def _floats(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come, the same answer on every host."""
    if jax.process_count() > 1:
        # The runtime of jax.distributed catches the signal and agrees on a step to stop at.
        steps = iter(range(2**62))
        yield lambda: multihost_utils.reached_preemption_sync_point(next(steps))
        return
    came = []
    previous = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _progress(log: RunLog, task: Task, step: int) -> Iterator[Callable[[Tree], None]]:
    """A bar with loss, SA, rate and time left; only where a person watches."""
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        console=log.console,
        transient=True,
        disable=not (log.enabled and log.console.is_terminal),
    )
    total = task.steps_per_epoch * task.num_epochs
    with bar:
        row: TaskID = bar.add_task("train", total=total, completed=step, status="compiling")

        def advance(metrics: Tree) -> None:
            speed = bar.tasks[0].speed
            status = f"loss {metrics['loss']:.3f}  SA {100 * metrics['standard_accuracy']:.1f}%"
            rate = f"  {speed * task.batch_size:.0f} images/s" if speed else ""
            bar.update(row, advance=1, status=status + rate)

        yield advance
