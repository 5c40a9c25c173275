"""Checkpoints that survive kills, full disks and damaged files; saved in the background by orbax.

A checkpoint is a directory named by its step, with two orbax items:

- ``state``: the leaves of the saved tree, as a flat mapping from path (``params/router/kernel``) to
  array. A flat mapping reads back without knowing the tree, so that damage (the content does not
  verify against itself) can be told from a mistake (it does, but is not the tree asked for).
- ``record``: step, metric, the sha256 over all leaves and whose it is, itself under a checksum.

Beside the checkpoints may stand ``damaged/`` (what did not verify, never deleted), ``deleted/``
(what retention has dropped, on its way out) and orbax's temporary directories (unfinished saves).
Nothing in these files is ever executed: they are JSON, and arrays that tensorstore decodes.

In a bucket they lie alike (see ``spool``). Several processes: every process calls every method, in
the same order, on one shared file system, with a state that is replicated, or spread, over all
devices. Process 0 writes, names and moves; all read, and what is restored all could verify.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from advmoe_jax import storage
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import whole
from advmoe_jax.training.spool import Spool

PyTree = Any

logger = logging.getLogger(__name__)

# Bytes of a file of arrays, about: what is cut in pieces can be carried where large files cannot.
_PIECE = 4 * 2**20

_RECORD_FILE = Path("record", "metadata")  # the name that orbax's JSON handler gives it

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_WORDS = tuple(os.strerror(number) for number in _DISK_FULL_ERRNOS)


class OtherState(UserError):
    """A checkpoint is intact, but of another state than the one asked for."""


def tree_sha256(tree: PyTree) -> str:
    """Returns the hexadecimal sha256 over path, dtype, shape and bytes of every leaf.

    Leaves are taken in the order of their paths, so the digest depends on neither the kinds of the
    containers nor their order: ``{"a": {"b": x}}`` and ``{"a/b": x}`` have the same.

    Args:
        tree: arrays, of JAX or numpy; of arrays that are spread over several processes, all of
            them have to call this.

    Raises:
        ValueError: two leaves have the same path.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(_named_leaves(tree).items()):
        array = _host_view(leaf)
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode() + b"\n")
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


class Checkpointer:
    """Saves and restores a training state; keeps the last ``keep`` checkpoints and the best one."""

    def __init__(self, directory: Path, keep: int, owner: str = "") -> None:
        """Touches no file: the first ``save`` creates the directory and clears unfinished saves.

        A program that only restores (an evaluation beside a running training) hence never disturbs
        the one that saves.

        Args:
            directory: where the checkpoints are, or will be.
            keep: how many of the latest checkpoints to keep, at least 1; the best is kept besides.
            owner: fingerprint of what the checkpoints are of; stands in each of them.

        Raises:
            ValueError: ``keep`` is not positive.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        # Where they belong, and where orbax sees them.
        self._place = directory if storage.is_remote(directory) else Path(directory).absolute()
        self._spool = Spool(directory, _RECORD_FILE) if storage.is_remote(directory) else None
        self._directory = self._spool.local if self._spool else self._place
        self._thread = ThreadPoolExecutor(1, "checkpoints")  # copies to the bucket
        self._pushing: Future[None] | None = None
        self._keep = keep
        self._owner = owner
        self._manager: ocp.CheckpointManager | None = None
        self._policy = _LatestAndBest(keep, {})
        self._step_in_progress = -1
        _silence_orbax()

    def save(self, step: int, state: PyTree, metric: float | None) -> None:
        """Starts saving ``state``; returns once it is copied, so that its buffers may be donated.

        Saving the same state again at the same step only records the metric, if there is one: a run
        that was stopped at the very end of an epoch evaluates when it resumes.

        Args:
            step: names the checkpoint.
            state: a tree of JAX arrays, none of them empty.
            metric: validation robust accuracy, higher is better; of equal ones the earlier is best.
                None (or NaN) for a checkpoint that cannot be best.

        Raises:
            UserError: the disk is full, for this save or the one before it.
            ValueError: another state is already saved at this step.
        """
        self.wait()
        # A copy of our own, of what all processes hold: orbax does not have to make one.
        leaves = {name: np.array(_host_view(x)) for name, x in _named_leaves(state).items()}
        if self._spool and jax.process_index() != 0:
            return  # the first process writes, on its own disk, and no other sees it there
        metric = None if metric is None or math.isnan(metric) else float(metric)
        record = _Record(step, metric, tree_sha256(leaves), self._owner)
        self._step_in_progress = step
        with self._explained_errors():
            manager = self._open_manager()
            if step in manager.all_steps():
                self._update_record(record)
                return
            self._policy.metrics[step] = metric
            items = ocp.args.Composite(
                state=ocp.args.PyTreeSave(
                    leaves,
                    {name: ocp.SaveArgs(chunk_byte_size=_PIECE) for name in leaves},
                    ocdbt_target_data_file_size=_PIECE,
                ),
                record=ocp.args.JsonSave(record.as_json()),
            )
            # Unless forced, orbax skips a step before the latest one without a word.
            manager.save(step, args=items, force=True)
            if self._spool:
                self._pushing = self._thread.submit(self._push, manager)

    def restore_latest(self, like: PyTree | None) -> tuple[int, PyTree] | None:
        """Returns step and state of the latest intact checkpoint, or None when there is none.

        A damaged checkpoint is named in a warning, moved to ``damaged/`` and skipped.

        Args:
            like: a tree of arrays or ``jax.ShapeDtypeStruct``s: the paths and shapes that the
                checkpoint must have, and the dtypes and shardings that the result gets
                (uncommitted, where there is no sharding). A part of what was saved will do: an
                evaluation needs no optimizer state. None for all that was saved, as numpy arrays
                by path (``state/params/...``).

        Returns:
            The arrays own their memory: they may be donated.

        Raises:
            UserError: the disk is full, for a save still under way.
            OtherState: the checkpoint is intact but lacks a leaf of ``like``, or its shape differs.
        """
        return self._restore(like, lambda metrics: sorted(metrics, reverse=True))

    def restore_best(self, like: PyTree | None) -> tuple[int, PyTree] | None:
        """Returns step and state of the intact checkpoint with the highest metric, or None.

        Arguments, result, errors and damaged checkpoints as for ``restore_latest``; checkpoints
        without a metric do not count.
        """
        return self._restore(like, _best_first)

    def saved_owner(self) -> str | None:
        """The owner that the latest intact checkpoint names; None if there is no checkpoint."""
        records = self._intact_records()
        return records[max(records)].owner if records else None

    def extract(self, directory: Path, wanted: Callable[[str], bool]) -> None:
        """Writes some leaves of the latest and the best checkpoint to another directory.

        Args:
            directory: of a ``Checkpointer`` of its own then; made whole or not at all.
            wanted: says of a leaf's path (``state/params/...``) whether it is taken along.

        Raises:
            UserError: the disk is full.
            ValueError: there is no intact checkpoint.
        """
        found = [restore(None) for restore in (self.restore_best, self.restore_latest)]
        leaves_of = dict(one for one in found if one is not None)
        if not leaves_of:
            raise ValueError(f"{self._directory} has no intact checkpoint")
        records = self._intact_records()
        owner = records[max(leaves_of)].owner
        with storage.taking_place_whole(directory) as place, Checkpointer(place, 1, owner) as other:
            for step, leaves in sorted(leaves_of.items()):
                taken = {name: leaf for name, leaf in leaves.items() if wanted(name)}
                other.save(step, taken, records[step].metric)

    def wait(self) -> None:
        """Returns when the save under way, if any, is on disk.

        Raises:
            UserError: the disk is full.
        """
        if self._manager is not None:
            with self._explained_errors():
                pushing, self._pushing = self._pushing, None
                if pushing is not None:
                    pushing.result()
                self._manager.wait_until_finished()
            self._empty_trash()

    def close(self) -> None:
        """Waits for the save under way and ends orbax's threads; a later ``save`` starts new ones.

        Raises:
            UserError: the disk is full.
        """
        try:
            self.wait()
            with self._explained_errors():
                self._close_manager()
        finally:
            if self._spool:
                self._spool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            records = self._intact_records(alone=self._spool is not None)
            metrics = {step: record.metric for step, record in records.items()}
            alone = ocp.options.MultiprocessingOptions()
            if self._spool:
                self._spool.clear_unfinished()
                alone = ocp.options.MultiprocessingOptions(
                    active_processes={0}, barrier_sync_key_prefix="bucket"
                )
            self._policy = _LatestAndBest(self._keep, metrics)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
                # Deleting takes many system calls; a kill amid them would leave a checkpoint that
                # looks damaged. Renaming is one.
                todelete_subdir="deleted",
                # Metrics are in our records, which are verified; orbax fails on damaged ones.
                lightweight_initialize=True,
                create=self._spool is None,  # orbax's own condition for the next one
                multiprocessing_options=alone,
            )
            handlers = {
                # The format that _read_arrays reads, whatever orbax's defaults will be.
                "state": ocp.PyTreeCheckpointHandler(
                    use_ocdbt=True, use_zarr3=False, multiprocessing_options=alone
                ),
                "record": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
            }
            self._manager = ocp.CheckpointManager(
                epath.Path(self._directory), options=options, item_handlers=handlers
            )
            self._empty_trash()
        return self._manager

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.close()

    def _push(self, manager: ocp.CheckpointManager) -> None:
        manager.wait_until_finished()
        self._spool.push()

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turns the error of a full disk into a UserError, and starts afresh after any error."""
        try:
            yield
        except Exception as error:
            # After a failed save orbax no longer knows which checkpoints exist. The next save opens
            # another manager, which lists them and clears what was left half-written.
            try:
                self._close_manager()
            except Exception:  # may be the same error again, and that one is raised below
                logger.debug("closing after a failed save", exc_info=True)
            if not _is_disk_full(error):
                raise
            raise UserError(
                f"disk full: cannot write checkpoint for step {self._step_in_progress} in "
                f"{self._directory}; free some space and run the same command again"
            ) from error

    def _update_record(self, record: "_Record") -> None:
        checkpoint = self._directory / str(record.step)
        if _Record.read(_record_file(checkpoint)).sha256 != record.sha256:
            raise ValueError(f"another state is already saved as {self._place / str(record.step)}")
        if record.metric is None:
            return
        self._policy.metrics[record.step] = record.metric
        if self._spool is None:
            _synchronise("checkpoint: record read")
        if jax.process_index() == 0:
            unfinished = _record_file(checkpoint).with_suffix(".new")
            unfinished.write_text(json.dumps(record.as_json()))
            os.replace(unfinished, _record_file(checkpoint))
            if self._spool:
                self._spool.push_record(record.step)
        if self._spool is None:
            _synchronise("checkpoint: record written")

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / "deleted", ignore_errors=True)

    def _restore(
        self, like: PyTree | None, order: Callable[[Mapping[int, float | None]], Sequence[int]]
    ) -> tuple[int, PyTree] | None:
        self.close()  # the manager would not notice what is moved aside
        tried: set[int] = set()
        while True:
            metrics = {step: record.metric for step, record in self._intact_records().items()}
            step = _first_process_decides(next((s for s in order(metrics) if s not in tried), -1))
            if step < 0:
                return None
            tried.add(step)
            reason = None
            is_there = self._spool is None or self._spool.fetch(step)
            if not _all_processes_agree(is_there):
                continue
            try:
                arrays = self._read_verified(step)
            except (MemoryError, PermissionError):
                raise  # not the checkpoint's fault
            except Exception as error:  # whatever a decoder says of arbitrary bytes
                arrays, reason = {}, error
            if _all_processes_agree(reason is None):
                if like is None:
                    return step, arrays
                return step, _place(arrays, like, self._place / str(step))
            self._move_aside(step, reason or "another process cannot read it")

    def _read_verified(self, step: int) -> dict[str, np.ndarray]:
        path = self._directory / str(step)
        record = _Record.read(_record_file(path))
        arrays = _read_arrays(path / "state")
        if tree_sha256(arrays) != record.sha256:
            raise ValueError("its content does not have the sha256 that was saved with it")
        return arrays

    def _intact_records(self, alone: bool = False) -> dict[int, "_Record"]:
        """Reads every checkpoint's record, by step; moves those aside whose record is damaged.

        Args:
            alone: whether no other process calls this at the same time.
        """
        # Process 0 comes first: the others must not list what it is about to move.
        if jax.process_index() != 0 and not alone:
            _synchronise("checkpoint: records")
        if self._spool:
            self._spool.refresh()
        records = {}
        for step in _steps_in(self._directory):
            try:
                record = _Record.read(_record_file(self._directory / str(step)))
                if record.step != step:
                    raise ValueError(f"its record is of step {record.step}")
                records[step] = record
            except PermissionError:
                raise  # not the checkpoint's fault
            except (OSError, ValueError, RecursionError) as error:
                self._move_aside(step, error)
        if jax.process_index() == 0 and not alone:
            _synchronise("checkpoint: records")
        return records

    def _move_aside(self, step: int, reason: object) -> None:
        """Moves a damaged checkpoint to ``damaged/``, so that its step can be saved again."""
        source = self._place / str(step)
        # It may be gone, too: dropped by the training that runs while we evaluate.
        if jax.process_index() != 0 or not source.exists():
            return
        what = " ".join(str(reason).split())[:300]
        copies = (source.parent / "damaged" / f"{step}-{n}" for n in range(1, 1_000_000))
        target = next(path for path in copies if not path.exists())
        try:
            if self._spool:
                self._spool.move_aside(step, f"damaged/{target.name}")
            else:
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
        except (OSError, UserError) as error:
            logger.warning(
                "checkpoint %s is damaged (%s), skipped; cannot move it: %s", source, what, error
            )
        else:
            logger.warning(
                "checkpoint %s is damaged (%s), skipped and moved to %s", source, what, target
            )


@dataclasses.dataclass(frozen=True)
class _Record:
    step: int
    metric: float | None
    sha256: str
    owner: str

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"checksum": self._checksum()}

    def _checksum(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError or ValueError (JSON's and Unicode's among them) when damaged."""
        content = json.loads(path.read_text())
        expected = {"step", "metric", "sha256", "owner", "checksum"}
        if not isinstance(content, dict) or content.keys() != expected:
            raise ValueError(f"{path} is not the record of a checkpoint")
        checksum = content.pop("checksum")
        record = cls(**content)
        if record._checksum() != checksum:
            raise ValueError(f"{path} does not have the checksum that was saved with it")
        return record


@dataclasses.dataclass
class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's LatestN or BestN, but ties go to the earlier step, and metrics are our records'."""

    keep: int
    metrics: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best_first({step: self.metrics.get(step) for step in steps})
        kept = {*sorted(steps)[-self.keep :], *best[:1]}
        return [step in kept for step in steps]


def _best_first(metrics: Mapping[int, float | None]) -> list[int]:
    ranked = [(-metric, step) for step, metric in metrics.items() if metric is not None]
    return [step for _, step in sorted(ranked)]


def _steps_in(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _record_file(checkpoint: Path) -> Path:
    return checkpoint / _RECORD_FILE


def _read_arrays(item: Path) -> dict[str, np.ndarray]:
    # Not by orbax's reader, which reads concurrently in an event loop: of several failing reads it
    # raises the first and abandons the others, which print their tracebacks now or later.
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}
    keys = ts.KvStore.open(database).result().list().result()
    names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    specs = [{"driver": "zarr", "kvstore": database | {"path": f"{name}/"}} for name in names]
    opening = [ts.open(spec) for spec in specs]
    reading = [future.result().read() for future in opening]
    return {name: future.result() for name, future in zip(names, reading, strict=True)}


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by path, in the order of flattening; raises ValueError on equal paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _host_view(leaf: Any) -> np.ndarray:
    """Returns the values on the host; on CPU they may share the memory of ``leaf``."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)  # all that one of several processes has
    return whole(leaf)


def _place(arrays: Mapping[str, np.ndarray], like: PyTree, checkpoint: Path) -> PyTree:
    """Returns the arrays of ``like``, as its tree, with its dtypes and shardings.

    Raises OtherState if a leaf is missing or has another shape.
    """
    wanted = _named_leaves(like)
    saved_shapes = {name: array.shape for name, array in arrays.items()}
    wanted_shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
    for name, shape in wanted_shapes.items():
        saved = saved_shapes.get(name, "missing")
        if saved != shape:
            raise OtherState(
                f"checkpoint {checkpoint} is intact but of another state: {name} is {saved} in the "
                f"checkpoint and {shape} in the state to restore"
            )
    placed = [_placed_like(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _placed_like(array: np.ndarray, like: Any) -> jax.Array:
    array = array.astype(like.dtype, copy=False)
    sharding = getattr(like, "sharding", None) if getattr(like, "committed", True) else None
    # On CPU, device_put and its kin make every device share the memory of the one numpy array;
    # donated, all devices would write to it at once. The result of a jitted copy is XLA's own.
    if sharding is None:
        return jax.jit(jnp.copy)(array)
    shared = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.jit(jnp.copy, out_shardings=sharding)(shared)


def _is_disk_full(error: BaseException | None) -> bool:
    # Tensorstore raises a ValueError that quotes the system's words. Its RESOURCE_EXHAUSTED alone
    # will not do: memory can be exhausted, too.
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
            return True
        if any(words in str(error) for words in _DISK_FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@functools.cache  # once per process
def _silence_orbax() -> None:
    """Keeps from stderr what orbax says of its progress, and of errors that it raises to us anyway.

    A user whose disk is full should read one line, and not some hundreds.
    """
    # Orbax logs through absl's one logger: progress at INFO, errors several times with traceback.
    logging.getLogger("absl").addFilter(_is_not_chatter)
    # When one of its concurrent writes fails, it abandons the others; they report to asyncio's
    # logger, or fail to report because their event loop is closed.
    logging.getLogger("asyncio").addFilter(_is_not_abandoned_write)
    other_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            other_hook(unraisable)

    sys.unraisablehook = hook


def _is_not_chatter(record: logging.LogRecord) -> bool:
    is_chatter = record.levelno < logging.WARNING or bool(record.exc_info)
    return not (is_chatter and f"{os.sep}orbax{os.sep}" in record.pathname)


def _is_not_abandoned_write(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _is_disk_full(record.exc_info[1]))


def _synchronise(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _first_process_decides(value: int) -> int:
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _all_processes_agree(verdict: bool) -> bool:
    if jax.process_count() == 1:
        return verdict
    return bool(np.all(multihost_utils.process_allgather(np.asarray(verdict))))
