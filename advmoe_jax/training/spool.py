"""Checkpoints in a bucket, as far as they are on this machine.

Orbax writes to a directory here, and each finished checkpoint is copied to the bucket, file by
file: it writes to ``gs://`` by itself, but neither to ``s3://`` nor to what else fsspec reaches,
and it cannot rename there. A checkpoint is in the bucket if its record is, which comes last and
goes first; what a kill leaves of one is removed before the next save.
"""

import re
import shutil
import tempfile
import uuid
from pathlib import Path

from advmoe_jax import storage

_RECORD = re.compile("(0|[1-9][0-9]*)/record/metadata")
_STEP = re.compile("(0|[1-9][0-9]*)/")


class Spool:
    """The directory on this machine, and what is to be copied to and fro.

    Args:
        remote: the checkpoints' directory in the bucket.
        record: path of a checkpoint's record below it.
    """

    def __init__(self, remote: Path, record: Path) -> None:
        self.remote = remote
        self.local = Path(tempfile.gettempdir()) / f"advmoe-checkpoints-{uuid.uuid4().hex}"
        self._record = record.as_posix()
        self._there: set[int] = set()
        self._fetched: set[int] = set()

    def refresh(self) -> None:
        """Brings the records of all checkpoints here, and forgets what is gone.

        Raises:
            UserError: if the bucket cannot be reached.
        """
        self.local.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = filter(None, map(_RECORD.fullmatch, storage.files_in(self.remote)))
        self._there = {int(match[1]) for match in found}
        for step in {int(x.name) for x in self.local.iterdir() if x.name.isdigit()} - self._there:
            self._forget(step)
        for step in sorted(self._there):
            here, record = self.local / str(step), self.local / str(step) / self._record
            before = record.read_bytes() if record.exists() else None
            try:
                storage.get(self.remote / str(step) / self._record, record)
            except FileNotFoundError:  # by now
                self._there.remove(step)
                self._forget(step)
            else:
                if before != record.read_bytes() and here.exists():
                    self._fetched.discard(step)

    def fetch(self, step: int) -> bool:
        """Brings a whole checkpoint here; False if it is gone by now.

        Raises:
            UserError: if the bucket cannot be reached.
        """
        if step in self._fetched:
            return True
        try:
            for name in storage.files_in(self.remote / str(step)):
                storage.get(self.remote / str(step) / name, self.local / str(step) / name)
        except FileNotFoundError:
            self._forget(step)
            return False
        self._fetched.add(step)
        return True

    def push(self) -> None:
        """Copies the checkpoints that are new here to the bucket; removes those that are gone.

        Raises:
            UserError: if the bucket cannot be reached.
        """
        here = {int(x.name) for x in self.local.iterdir() if re.fullmatch(r"\d+", x.name)}
        for step in sorted(here - self._there):
            folder = self.local / str(step)
            files = [x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()]
            for name in sorted(files, key=lambda name: (name == self._record, name)):
                storage.put(folder / name, self.remote / str(step) / name)
            self._there.add(step)
            self._fetched.add(step)
        for step in sorted(self._there - here):
            (self.remote / str(step) / self._record).unlink(missing_ok=True)
            storage.remove_tree(self.remote / str(step))
            self._there.remove(step)

    def push_record(self, step: int) -> None:
        """Copies a record that was changed here."""
        storage.put(self.local / str(step) / self._record, self.remote / str(step) / self._record)

    def clear_unfinished(self) -> None:
        """Removes what a kill has left of checkpoints in the bucket."""
        names = filter(None, map(_STEP.match, storage.files_in(self.remote)))
        for step in {int(match[1]) for match in names} - self._there:
            storage.remove_tree(self.remote / str(step))

    def move_aside(self, step: int, name: str) -> None:
        """Moves a checkpoint to another directory of the bucket, relative to the checkpoints'."""
        storage.move(self.remote / str(step), self.remote / name)
        self._forget(step)
        self._there.discard(step)

    def clear(self) -> None:
        """Removes all that is on this machine."""
        shutil.rmtree(self.local, ignore_errors=True)
        self._there, self._fetched = set(), set()

    def _forget(self, step: int) -> None:
        shutil.rmtree(self.local / str(step), ignore_errors=True)
        self._fetched.discard(step)
