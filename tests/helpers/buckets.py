"""A storage of objects in the place of ``gs://`` and ``s3://``, which several processes share.

What it cannot do is what buckets cannot do: no directories, no rename, no append, no lock. Every
object is one file of a folder, named by its quoted key; the folder is ``ADVMOE_BUCKETS``.
"""

import io
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote, unquote

import fsspec
from etils.epath import backend
from fsspec.spec import AbstractFileSystem

MADE, FORBIDDEN, UNREACHABLE = "bucket", "forbidden", "unreachable"


class ClientError(Exception):
    """As the libraries have them: no OSError."""

    __module__ = "botocore.exceptions"


class Buckets(AbstractFileSystem):
    """One bucket is there, one must not be touched, one does not answer; no others exist."""

    protocol = ("gs", "gcs", "s3")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return os.fspath(path).split("://")[-1].strip("/")

    def unstrip_protocol(self, name):
        return f"gs://{self._strip_protocol(name)}"

    def _file(self, path):
        path = self._strip_protocol(path)
        bucket = path.partition("/")[0]
        if bucket == FORBIDDEN:
            raise PermissionError(f"Forbidden: {path}")
        if bucket == UNREACHABLE:
            raise ClientError("Could not connect to the endpoint URL")
        if bucket != MADE:
            raise FileNotFoundError("The specified bucket does not exist")
        return Path(os.environ["ADVMOE_BUCKETS"], quote(path, safe=""))

    def info(self, path, **kwargs):
        path, file = self._strip_protocol(path), self._file(path)
        try:
            about = file.stat()
            version = f"{about.st_mtime_ns}-{about.st_ino}"
            return {"name": path, "size": about.st_size, "type": "file", "ETag": version}
        except FileNotFoundError:
            if path == MADE or self.find(path):
                return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def exists(self, path, **kwargs):
        try:  # fsspec's own takes every error for a no; the libraries' do not
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
        root = f"{self._strip_protocol(path)}/"
        folder = self._file(path).parent
        names = (unquote(name) for name in os.listdir(folder) if not name.startswith("."))
        found = sorted(name for name in names if name.startswith(root))
        return {name: self.info(name) for name in found} if detail else found

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        root = f"{path}/"
        names = {root + x.removeprefix(root).partition("/")[0] for x in self.find(path)}
        if not names and self._file(path).exists():
            names = {path}
        if not names:
            raise FileNotFoundError(path)
        return [self.info(name) for name in sorted(names)] if detail else sorted(names)

    def _open(self, path, mode="rb", **kwargs):
        file = self._file(path)
        if mode == "rb":
            try:
                return io.BytesIO(file.read_bytes())
            except FileNotFoundError:
                raise FileNotFoundError(path) from None
        if mode != "wb":
            raise NotImplementedError(f"mode {mode}")
        return _Written(file)

    def rm_file(self, path):
        try:
            self._file(path).unlink()
        except FileNotFoundError:
            raise FileNotFoundError(path) from None

    def rm(self, path, recursive=False, maxdepth=None):
        for name in self.find(path) if recursive else [path]:
            self.rm_file(name)

    def cp_file(self, path1, path2, **kwargs):
        with self._open(path1) as source, self._open(path2, "wb") as target:
            target.write(source.read())

    def mkdir(self, path, **kwargs):
        raise AssertionError("a bucket has no directories to be made")

    def makedirs(self, path, exist_ok=False):
        pass


class _Written(io.BytesIO):
    """An object that is there when it is closed."""

    def __init__(self, file):
        super().__init__()
        self._place = file

    def close(self):
        if not self.closed:
            partial = self._place.with_name(f".{os.getpid()}-{id(self)}")
            partial.write_bytes(self.getvalue())
            os.replace(partial, self._place)
        super().close()


@contextmanager
def registered():
    """This process finds ``gs://`` and ``s3://`` there."""
    with patch.dict(sys.modules["fsspec.registry"]._registry):
        for name in ("gcs", "gs", "s3"):
            fsspec.register_implementation(name, Buckets, clobber=True)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield
    backend.fsspec_backend._get_filesystem.cache_clear()
