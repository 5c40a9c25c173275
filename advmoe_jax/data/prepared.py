"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow and without network."""

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax import storage
from advmoe_jax.data.decoding import Encoded
from advmoe_jax.data.folders import no_such_split
from advmoe_jax.errors import UserError
from advmoe_jax.files import read_npz, write_npz

LABELS = "labels-{}.npz"  # of a split, beside its records; those hold them too, among the images


class Records(Sequence[Encoded]):
    """Images that stay in their files, one by one to be read by their numbers.

    Args:
        source: of TensorFlow Datasets: a number -> the record.
        keys: of a record's image and label.
        name: of the split, in the names of its images.
        damaged: what to say where they cannot be read.
        labels: int32 [n]; None: those that the records hold, which reads all of them.
    """

    def __init__(
        self,
        source: Any,
        keys: tuple[str, str],
        name: str,
        damaged: str,
        labels: np.ndarray | None = None,
    ) -> None:
        self._source, self._keys, self._name, self._damaged = source, keys, name, damaged
        self.labels = self._read_labels() if labels is None else labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> Encoded:
        label = int(self.labels[number])
        return Encoded(f"{self._name}[{number}]", label, partial(self._content, number))

    def in_memory(self) -> list[Encoded]:
        """All of them, read."""
        return [item._replace(content=item.content()) for item in self]

    def _content(self, number: int) -> bytes:
        return self._record(number)[self._keys[0]]

    def _record(self, number: int) -> dict[str, Any]:
        try:
            return self._source[number]
        except Exception as error:  # array_record's C++ part and protobuf raise many kinds
            raise UserError(self._damaged) from error

    def _read_labels(self) -> np.ndarray:
        count = range(len(self._source))
        return np.fromiter((self._record(i)[self._keys[1]] for i in count), np.int32)


def read_prepared(
    name: str, data_dir: str, train_split: str, test_split: str, stream: bool = False
) -> tuple[tuple[str, ...], Sequence[Encoded], Sequence[Encoded]]:
    """Names of the classes, and both splits; see ``sources.load``.

    Args:
        name: of the data set.
        data_dir: where it was prepared; empty for the default.
        train_split: the split to train on.
        test_split: the split to measure on.
        stream: leave the images in their files; what labels they have is then written beside them
            once, since to ask the records is to read them all.

    Raises:
        UserError: if it is not prepared there, cannot be read, or is no labelled set of images, or
            TensorFlow Datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds

        # Not tfds.builder nor tfds.data_source: both ask the network about what is not prepared.
        from tensorflow_datasets.core.read_only_builder import builder_from_files
    except ImportError:
        raise UserError(
            f"tfds:{name} is read by TensorFlow Datasets, which is not installed: run `pip install "
            "'advmoe_jax[tfds]'`, or, in a checkout, `pip install -e '.[tfds]'`"
        ) from None

    place = None  # TFDS's default
    if data_dir:
        location = storage.path_of(data_dir)
        data_dir, place = str(location), _on_this_machine(location, name)
    # Preparing needs what reading does not. The command avoids ``tfds build``, which asks for
    # Apache Beam; importlib_resources is missing from tfds' own requirements.
    arguments = [json.dumps(name), *([f"data_dir={json.dumps(data_dir)}"] if data_dir else [])]
    program = (
        "import tensorflow_datasets as tfds;"
        f' tfds.builder({", ".join(arguments)}, file_format="array_record").download_and_prepare()'
    )
    prepare = (
        f"pip install tensorflow importlib_resources && {shlex.join(['python', '-c', program])}"
    )
    try:
        builder = builder_from_files(name, data_dir=place)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"tfds:{name} is not prepared in {data_dir or tfds.core.constants.DATA_DIR}: prepare it"
            f" once with `{prepare}`"
        ) from error
    except Exception as error:  # a damaged or ambiguous directory raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"tfds:{name} cannot be opened: {reason}; mend that, or prepare it in another data_dir"
        ) from error

    features = dict(builder.info.features.items())
    keys = builder.info.supervised_keys or ("image", "label")
    image, label = (features.get(key) for key in keys[:2])
    if not (
        isinstance(image, tfds.features.Image)
        and image.np_dtype == np.uint8  # .dtype would import TensorFlow
        and isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(f"tfds:{name} is not a set of 8-bit images with one class label each")

    def read(split: str) -> Sequence[Encoded]:
        try:
            # The images stay encoded, so that threads decode them and damage has a name.
            source = builder.as_data_source(split, decoders={keys[0]: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(
                f"tfds:{name} in {builder.data_dir} is not in the array_record format: remove it or"
                f" give another path, then prepare it with `{prepare}`"
            ) from error
        except ValueError as error:
            raise no_such_split(split, builder.info.splits, f"tfds:{name}") from error
        if not len(source):
            raise UserError(f"split {split!r} of tfds:{name} is empty: name another")
        damaged = (
            f"split {split!r} of tfds:{name} in {builder.data_dir} cannot be read: remove that"
            f" directory, then prepare it with `{prepare}`"
        )
        file = Path(builder.data_dir) / LABELS.format(split)
        labels = _kept_labels(file, len(source), len(label.names)) if stream else None
        records = Records(source, keys[:2], f"{builder.data_dir}: {split}", damaged, labels)
        if stream and labels is None and split in builder.info.splits:
            _keep_labels(file, records.labels)
        if records.labels.min() < 0:
            raise UserError(f"split {split!r} of tfds:{name} has no labels: name another")
        return records if stream else records.in_memory()

    return tuple(label.names), read(train_split), read(test_split)


def _on_this_machine(data_dir: Path, name: str) -> Path:
    """Where the data set can be read: of one in a bucket a copy, since records are read by C++."""
    if not storage.is_remote(data_dir):
        return data_dir
    whole = data_dir / re.split("[/:]", name)[0]
    return storage.local_copy(whole).parent if storage.files_in(whole) else data_dir


def _kept_labels(file: Path, count: int, num_classes: int) -> np.ndarray | None:
    """The labels that were written beside the records; None if there are none of this split."""
    try:
        labels = read_npz(file)["labels"]
    except (UserError, KeyError):
        return None
    is_whole = labels.dtype == np.int32 and labels.shape == (count,)
    return labels if is_whole and labels.min() >= -1 and labels.max() < num_classes else None


def _keep_labels(file: Path, labels: np.ndarray) -> None:
    with suppress(OSError):  # the data may be somebody else's; then the records are asked each time
        write_npz(file, {"labels": labels})
