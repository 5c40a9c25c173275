"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow and without network."""

import json
import shlex
from pathlib import Path

import numpy as np

from advmoe_jax.data.decoding import Encoded
from advmoe_jax.data.folders import no_such_split
from advmoe_jax.errors import UserError


def read_prepared(
    name: str, data_dir: str, train_split: str, test_split: str
) -> tuple[tuple[str, ...], list[Encoded], list[Encoded]]:
    """Names of the classes, and both splits; see ``sources.load``.

    Args:
        name: of the data set.
        data_dir: where it was prepared; empty for the default.
        train_split: the split to train on.
        test_split: the split to measure on.

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

    if data_dir:
        data_dir = str(Path(data_dir).expanduser())
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
        builder = builder_from_files(name, data_dir=data_dir or None)
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

    def read(split: str) -> list[Encoded]:
        try:
            # The images stay encoded, so that threads decode them and damage has a name.
            records = builder.as_data_source(split, decoders={keys[0]: tfds.decode.SkipDecoding()})
        except NotImplementedError as error:
            raise UserError(
                f"tfds:{name} in {builder.data_dir} is not in the array_record format: remove it or"
                f" give another path, then prepare it with `{prepare}`"
            ) from error
        except ValueError as error:
            raise no_such_split(split, builder.info.splits, f"tfds:{name}") from error
        try:
            items = [
                Encoded(f"{builder.data_dir}: {split}[{i}]", record[keys[1]], record[keys[0]])
                for i, record in enumerate(records)
            ]
        except Exception as error:  # array_record's C++ part and protobuf raise many kinds
            raise UserError(
                f"split {split!r} of tfds:{name} in {builder.data_dir} cannot be read: remove that"
                f" directory, then prepare it with `{prepare}`"
            ) from error
        if not items:
            raise UserError(f"split {split!r} of tfds:{name} is empty: name another")
        if min(item.label for item in items) < 0:
            raise UserError(f"split {split!r} of tfds:{name} has no labels: name another")
        return items

    return tuple(label.names), read(train_split), read(test_split)
