"""Writes a folder or an archive of images as a data set of TensorFlow Datasets, without TensorFlow.

TFDS's own builders begin anew after an interruption. Here every file of records takes its place
when it is whole, so that the same call goes on; what describes them comes last, and until then
TFDS sees no data set.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from advmoe_jax import storage
from advmoe_jax.data.decoding import Encoded, content_of, decode_one, shape_of
from advmoe_jax.data.folders import Splits, read_splits
from advmoe_jax.data.prepared import LABELS
from advmoe_jax.errors import UserError
from advmoe_jax.files import read_json, write_bytes, write_json, write_npz

VERSION = "1.0.0"
SOURCE = "source.json"  # what a set was made of
_INFO = "dataset_info.json"  # without it TFDS sees no data set
_FORMAT = "array_record"
_SHARD_BYTES = 2**26
_USUAL_SPLITS = ("val", "validation", "test")


class Shard(NamedTuple):
    """One file of records: some images of a split, in order."""

    file: Path
    items: Sequence[Encoded]


class Plan(NamedTuple):
    """What is to be written, all of it known before.

    Attributes:
        name: of the data set.
        directory: of its version, ``<data_dir>/<name>/1.0.0``.
        splits: the images.
        shards: of each split.
    """

    name: str
    directory: Path
    splits: Splits
    shards: dict[str, list[Shard]]

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(map(len, self.splits.images.values()))

    @property
    def described(self) -> str:
        """How many classes and files there are, in words."""
        counts = ", ".join(
            f"{len(items):,} files of {split}" for split, items in self.splits.images.items()
        )
        text = f"{self.name}: {len(self.splits.class_names)} classes, {counts}"
        skipped = self.splits.skipped
        return text + (f"; {skipped:,} other files are no PNG or JPEG, or links" if skipped else "")

    @property
    def is_done(self) -> bool:
        """Whether all of it is there already.

        Raises:
            UserError: if there is another data set, or a file of this one is missing.
        """
        if not (self.directory / _INFO).exists():
            return False
        if read_json(self.directory / SOURCE) != self.origin:
            raise UserError(
                f"{self.directory} holds a data set that was prepared of other files than"
                f" {self.splits.location}: remove it, or give another --data_dir or --dataset"
            )
        for shard in self.all_shards:
            if not shard.file.exists():
                raise UserError(
                    f"{shard.file} is missing: remove {self.directory} and give the command again"
                )
        return True

    @property
    def all_shards(self) -> list[Shard]:
        """Those of all splits."""
        return [shard for shards in self.shards.values() for shard in shards]

    @property
    def origin(self) -> dict[str, Any]:
        """What the images are made of, by their names and sizes; nothing is read for it."""
        digest = hashlib.sha256()
        for split, items in self.splits.images.items():
            for item in items:
                where = _name_in(self.splits, item)
                digest.update(f"{split}\0{where}\0{item.label}\0{_size(item)}\0".encode())
        return {
            "classes": list(self.splits.class_names),
            "files": {split: len(items) for split, items in self.splits.images.items()},
            "sha256_of_names_and_sizes": digest.hexdigest(),
            "shards": {split: len(shards) for split, shards in self.shards.items()},
        }


def plan(
    name: str,
    source: str,
    data_dir: str,
    splits: Sequence[str] = (),
    shard_bytes: int = _SHARD_BYTES,
) -> Plan:
    """What a data set will consist of; nothing is written.

    Args:
        name: of the data set, for ``tfds:<name>``.
        source: a directory or an archive, see ``sources.load``.
        data_dir: the data set comes to lie in ``<data_dir>/<name>``.
        splits: those to be prepared; empty: ``train``, and of ``val``, ``validation`` and ``test``
            those that there are with classes.
        shard_bytes: of encoded images in a file of records, about.

    Raises:
        UserError: if the name is none, or the images are not there or not sorted into classes.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UserError(
            f"--dataset={name} is no name of a data set: use small letters, digits and single"
            " underscores, such as tiny_imagenet"
        )
    wanted = (splits, ()) if splits else (("train",), _USUAL_SPLITS)
    found = read_splits(source, *wanted)
    directory = storage.path_of(data_dir) / name / VERSION
    shards = {}
    for split, items in found.images.items():
        count = max(1, -(-sum(map(_size, items)) // shard_bytes))
        cuts = np.arange(count + 1) * len(items) // count
        shards[split] = [
            Shard(
                directory / f"{name}-{split}.{_FORMAT}-{i:05d}-of-{count:05d}",
                items[cuts[i] : cuts[i + 1]],
            )
            for i in range(count)
        ]
    return Plan(name, directory, found, shards)


def write(plan: Plan, advance: Callable[[int], None] = lambda images: None) -> list[str]:
    """Writes what is planned, or what is left of it.

    Every image is decoded once, and written as it is. Where one cannot be, its file of records is
    not written; the others are, so that all such images are known in the end.

    Args:
        plan: from ``plan``.
        advance: told the number of images after each file of records.

    Returns:
        What is wrong with each image that cannot be decoded, one line each; if there are any, the
        data set is not there yet.

    Raises:
        UserError: if what it takes is not installed.
    """
    tfds, array_record = _libraries()
    directory = plan.directory
    if read_json(directory / SOURCE) != plan.origin:
        for left in directory.glob(f"{plan.name}-*"):  # of a source that has changed since
            left.unlink()
        write_json(directory / SOURCE, plan.origin)
    features = _features(tfds, plan, channels=3)
    damaged = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for shard in plan.all_shards:
            if not shard.file.exists():
                read = list(threads.map(_checked, shard.items))
                wrong = [found for found in read if isinstance(found, str)]
                damaged += wrong
                if not wrong:
                    records = (
                        _record(features, plan.splits, item, content)
                        for item, content in zip(shard.items, read, strict=True)
                    )
                    _write_shard(array_record, shard.file, records)
            advance(len(shard.items))
    if not damaged:
        _write_description(tfds, plan)
    return damaged


def _libraries() -> tuple[Any, Any]:
    try:
        import tensorflow_datasets as tfds
        from array_record.python import array_record_module
    except ImportError:
        raise UserError(
            "data sets are written in the format of TensorFlow Datasets, which is not installed:"
            " run `pip install 'advmoe_jax[tfds]'`, or, in a checkout, `pip install -e '.[tfds]'`"
        ) from None
    return tfds, array_record_module


def _name_in(splits: Splits, item: Encoded) -> str:
    return item.name.removeprefix(f"{splits.location}: ")


def _size(item: Encoded) -> int:
    return item.content.stat().st_size if isinstance(item.content, Path) else len(item.content)


def _checked(item: Encoded) -> bytes | str:
    """The encoded image; a line that says what is wrong if it cannot be decoded."""
    try:
        content = content_of(item)
        decode_one(item._replace(content=content), 0)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{item.name} cannot be read: {error.strerror}"
    return content


def _features(tfds: Any, plan: Plan, channels: int) -> Any:
    return tfds.features.FeaturesDict(
        {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, channels)),
            "label": tfds.features.ClassLabel(names=plan.splits.class_names),
        }
    )


def _record(features: Any, splits: Splits, item: Encoded, content: bytes) -> bytes:
    record = {"file_name": _name_in(splits, item), "image": content, "label": item.label}
    return features.serialize_example(features.encode_example(record))


def _write_shard(array_record: Any, file: Path, records: Iterator[bytes]) -> None:
    """A file of records, whole or not at all."""
    with storage.taking_place(file) as partial:
        # One record a group, as TFDS has it: each is read by itself. Images are compressed already.
        writer = array_record.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
        with partial.open("rb") as written:
            os.fsync(written.fileno())


def _write_description(tfds: Any, plan: Plan) -> None:
    """What TFDS reads first; its presence says that all the rest is there."""
    items = plan.splits.images
    for split, images in items.items():
        labels = np.array([item.label for item in images], np.int32)
        write_npz(plan.directory / LABELS.format(split), {"labels": labels})
    *_, channels = shape_of((item for images in items.values() for item in images), 0)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=plan.name, version=tfds.core.Version(VERSION), data_dir=str(plan.directory),
        module_name="",
    )  # fmt: skip
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=_features(tfds, plan, channels),
        supervised_keys=("image", "label"),
    )
    info.set_file_format(_FORMAT)
    names = tfds.core.ShardedFileTemplate(
        data_dir=plan.directory, dataset_name=plan.name, filetype_suffix=_FORMAT
    )
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.items) for shard in shards],
            num_bytes=sum(storage.size(shard.file) for shard in shards),
            filename_template=names,
        )
        for split, shards in plan.shards.items()
    ]
    info.set_splits(tfds.core.SplitDict(splits))
    with TemporaryDirectory() as made:
        info.write_to_directory(made)
        for file in sorted(Path(made).iterdir(), key=lambda file: file.name == _INFO):
            write_bytes(plan.directory / file.name, file.read_bytes())
