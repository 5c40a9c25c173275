"""Data sets of TensorFlow Datasets, prepared here, and read without TensorFlow."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data.sources import load

NAMES = ("train/dog/0", "train/dog/1", "train/cat/2", "train/cat/3", "test/dog/4", "test/cat/5")
PIXELS = {
    f"{name}.png": np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    for seed, name in enumerate(NAMES)
}


def test_the_library_that_reads_them_may_be_missing(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    said = refusal(load, "tfds:cifar10")
    assert said.startswith("tfds:cifar10 is read by TensorFlow Datasets, which is not installed: ")
    assert "pip install -e '.[tfds]'" in said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with a data set that tfds itself prepared, without TensorFlow."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    files = tmp_path_factory.mktemp("files")
    for name, array in PIXELS.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(files / name)

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # tfds asks for importlib_resources, which it does not install, if the name has a dot.
        __module__ = "tiny_pets"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "coarse": tfds.features.ClassLabel(names=["animal"]),
                        "image": tfds.features.Image(),
                        "label": tfds.features.ClassLabel(names=["dog", "cat"]),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, download_manager):
            return {
                "train": self._generate_examples("train"),
                "test": self._generate_examples("test"),
                "unlabelled": self._generate_examples("test", label=-1),
            }

        def _generate_examples(self, split, label=None):
            for name in PIXELS:
                if name.startswith(split):
                    label_name = name.split("/")[1] if label is None else label
                    yield name, {"coarse": 0, "image": str(files / name), "label": label_name}

    data_dir = tmp_path_factory.mktemp("tensorflow_datasets")
    TinyPets(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture
def no_network(monkeypatch):
    """The addresses that anything asked for, which must stay none."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def by_content(split):
    return {image.tobytes(): label for image, label in zip(split.images, split.labels, strict=True)}


def expected_by_content(prefix, names):
    return {
        array.tobytes(): names.index(name.split("/")[1])
        for name, array in PIXELS.items()
        if name.startswith(prefix)
    }


def test_tfds_prepared(prepared, no_network):
    dataset = load("tfds:tiny_pets", str(prepared))
    assert dataset.name == "tiny_pets" and dataset.class_names == ("dog", "cat")
    assert by_content(dataset.train) == expected_by_content("train", ["dog", "cat"])
    assert by_content(dataset.test) == expected_by_content("test", ["dog", "cat"])
    assert dataset.train.images.dtype == np.uint8 and dataset.train.labels.dtype == np.int32
    again = load("tfds:tiny_pets:1.0.0", str(prepared))
    np.testing.assert_array_equal(dataset.train.images, again.train.images)
    assert no_network == []


def test_tfds_slices_and_resizing(prepared):
    dataset = load("tfds:tiny_pets", str(prepared), 3, "train[:50%]", "train[50%:]")
    assert dataset.train.images.shape == dataset.test.images.shape == (2, 3, 3, 3)


def test_tfds_is_read_without_tensorflow(prepared, tmp_path):
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = (
        "from advmoe_jax.data.sources import load;"
        f"print(load('tfds:tiny_pets', {str(prepared)!r}).train.images.shape)"
    )
    repository = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), repository])},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "(4, 6, 5, 3)\n", result.stderr


@pytest.mark.parametrize("name", ["cifar10", "no_such_set"])
def test_tfds_not_prepared_gives_the_command(refusal, tmp_path, no_network, name):
    message = refusal(load, f"tfds:{name}", str(tmp_path / "with space"))
    assert f"tfds:{name} is not prepared in {tmp_path}/with space" in message
    assert message.endswith(
        "`pip install tensorflow importlib_resources && python -c 'import tensorflow_datasets as"
        f' tfds; tfds.builder("{name}", data_dir="{tmp_path}/with space",'
        ' file_format="array_record").download_and_prepare()\'`'
    )
    assert no_network == []


def test_tfds_default_directory_needs_no_data_dir(refusal, no_network):
    message = refusal(load, "tfds:no_such_set")
    assert ' tfds.builder("no_such_set", file_format="array_record")' in message
    assert no_network == []


def test_tfds_unknown_empty_and_unlabelled_splits(refusal, prepared):
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="validation")
    assert "tfds:tiny_pets has no split 'validation'" in message
    assert "test, train, unlabelled" in message
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="unlabelled")
    assert "'unlabelled'" in message and "no labels" in message
    message = refusal(load, "tfds:tiny_pets", str(prepared), test_split="train[:0]")
    assert "'train[:0]'" in message


def copy_with(prepared, tmp_path, change, file):
    """The prepared set with one of its files changed."""
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / "tiny_pets" / "1.0.0" / file
    path.write_bytes(change(path.read_bytes()))
    return str(tmp_path / "copy")


def test_tfds_of_another_format_gives_the_command(refusal, prepared, tmp_path):
    def as_tfrecord(content):
        return json.dumps({**json.loads(content), "fileFormat": "tfrecord"}).encode()

    path = copy_with(prepared, tmp_path, as_tfrecord, "dataset_info.json")
    message = refusal(load, "tfds:tiny_pets", path)
    assert f"tfds:tiny_pets in {path}/tiny_pets/1.0.0 is not in the array_record" in message
    assert f'tfds.builder("tiny_pets", data_dir="{path}", file_format="array_record")' in message


def test_tfds_that_is_not_image_classification(refusal, prepared, tmp_path):
    def without_classes(content):
        content = json.loads(content)
        content["featuresDict"]["features"]["label"] = content["featuresDict"]["features"]["image"]
        return json.dumps(content).encode()

    path = copy_with(prepared, tmp_path, without_classes, "features.json")
    assert "tfds:tiny_pets is not a set of 8-bit images" in refusal(load, "tfds:tiny_pets", path)


def test_tfds_damaged(refusal, prepared, tmp_path):
    path = copy_with(prepared, tmp_path, lambda content: b"{", "dataset_info.json")
    assert "tfds:tiny_pets cannot be opened" in refusal(load, "tfds:tiny_pets", path)


def test_tfds_damaged_records(refusal, prepared, tmp_path):
    file = "tiny_pets-train.array_record-00000-of-00001"
    path = copy_with(prepared, tmp_path, lambda content: content[:100], file)
    message = refusal(load, "tfds:tiny_pets", path)
    assert f"split 'train' of tfds:tiny_pets in {path}/tiny_pets/1.0.0 cannot be read" in message
