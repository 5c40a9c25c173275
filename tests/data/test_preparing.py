"""A folder or an archive becomes a data set of TFDS: whole, resumed, and damaged files named."""

import io
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from advmoe_jax.data import preparing
from advmoe_jax.data.sources import load
from advmoe_jax.errors import UserError

CLASSES = ("cat", "dog")


def jpeg(seed, size=(8, 6), grey=False):
    shape = size[::-1] if grey else (*size[::-1], 3)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(
        file, "JPEG"
    )
    return file.getvalue()


def write_tree(root, grey=False):
    """Tiny-ImageNet's layout: 12 images to train on, 4 of val by a list, test without classes."""
    for label, name in enumerate(CLASSES):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("no image\n")
        for i in range(6):
            file = root / "train" / name / "images" / f"{name}_{i}.JPEG"
            file.write_bytes(jpeg(10 * label + i, grey=grey))
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(4):
            file = root / split / "images" / f"{split}_{i}.JPEG"
            file.write_bytes(jpeg(50 + i, grey=grey))
    lines = [f"val_{i}.JPEG\t{CLASSES[i % 2]}\t0\t0\t5\t5\n" for i in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "tiny-imagenet-2")


def contents(directory):
    """Every file's bytes and time of change; the lock is no part of a data set."""
    return {
        file.relative_to(directory).as_posix(): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in directory.rglob("*")
        if file.is_file()
    }


def bytes_of(directory):
    return {name: content for name, (content, _) in contents(directory).items()}


def prepare(source, data_dir, **settings):
    plan = preparing.plan("tiny", str(source), str(data_dir), **settings)
    assert not plan.is_done
    plan.directory.mkdir(parents=True, exist_ok=True)
    return plan, preparing.write(plan)


def assert_same_images(found, expected):
    assert found.class_names == expected.class_names
    for part, other in ((found.train, expected.train), (found.test, expected.test)):
        np.testing.assert_array_equal(np.asarray(part.images), np.asarray(other.images))
        np.testing.assert_array_equal(part.labels, other.labels)


@pytest.mark.parametrize("grey", [False, True])
def test_what_is_prepared_is_the_folder_in_its_order(tmp_path, grey):
    tree = write_tree(tmp_path / "tiny-imagenet-2", grey)
    plan, damaged = prepare(tree, tmp_path / "data", shard_bytes=1000)
    assert damaged == [] and plan.is_done and plan.total == 16
    assert plan.described == (
        "tiny: 2 classes, 12 files of train, 4 files of val; "
        "2 other files are no PNG or JPEG, or links"
    )
    assert len(plan.shards["train"]) > 2  # so that there is something to go on with
    expected = load("image_folder", str(tree), test_split="val")
    assert expected.train.images.shape[-1] == (1 if grey else 3)
    for stream in (False, True):
        found = load("tfds:tiny", str(tmp_path / "data"), test_split="val", stream=stream)
        assert found.name == "tiny"
        assert_same_images(found, expected)


def test_tfds_reads_what_is_prepared(tree, tmp_path):
    """By its own decoders, with the name of each file."""
    import tensorflow_datasets as tfds

    prepare(tree, tmp_path / "data")
    builder = tfds.builder("tiny", data_dir=tmp_path / "data")
    assert builder.info.features["label"].names == list(CLASSES)
    assert builder.info.splits["train"].num_examples == 12
    record = builder.as_data_source("train")[7]
    assert record["label"] == 1 and record["image"].shape == (6, 8, 3)
    assert record["file_name"] == b"train/dog/images/dog_1.JPEG"
    assert "tensorflow" not in sys.modules


def test_an_archive_and_its_directory_are_prepared_alike(tree, tmp_path):
    archive = tmp_path / "tiny-imagenet-2.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tree, tree.name)
    prepare(archive, tmp_path / "of_archive")
    prepare(tree, tmp_path / "of_directory")
    of_archive = load("tfds:tiny", str(tmp_path / "of_archive"), test_split="val")
    assert_same_images(
        of_archive, load("tfds:tiny", str(tmp_path / "of_directory"), test_split="val")
    )


def test_interrupted_and_gone_on_with_it_has_the_same_bytes(tree, tmp_path):
    whole, _ = prepare(tree, tmp_path / "whole", shard_bytes=1000)
    plan = preparing.plan("tiny", str(tree), str(tmp_path / "data"), shard_bytes=1000)
    plan.directory.mkdir(parents=True)

    class Killed(Exception):
        pass

    done = []

    def stop_after_two(images):
        done.append(images)
        if len(done) == 2:
            raise Killed

    with pytest.raises(Killed):
        preparing.write(plan, stop_after_two)
    files = [shard.file for shard in plan.all_shards]
    assert [file.exists() for file in files] == [True, True] + [False] * (len(files) - 2)
    assert not plan.is_done
    with pytest.raises(UserError, match="not prepared"):
        load("tfds:tiny", str(tmp_path / "data"), test_split="val")
    # What a kill in the middle of a file leaves is overwritten.
    files[2].with_name(f"{files[2].name}.partial").write_bytes(b"half")
    before = contents(plan.directory)
    assert preparing.write(plan) == []
    after = contents(plan.directory)
    for file in files[:2]:
        assert after[file.name] == before[file.name]  # not written again
    assert bytes_of(plan.directory) == bytes_of(whole.directory)


def test_files_that_cannot_be_decoded_are_all_named_and_mended(tree, tmp_path):
    broken = [
        tree / "train/cat/images/cat_2.JPEG",
        tree / "train/dog/images/dog_5.JPEG",
        tree / "val/images/val_3.JPEG",
    ]
    kept = [file.read_bytes() for file in broken]
    broken[0].write_bytes(kept[0][: len(kept[0]) // 2])
    broken[1].write_bytes(b"")
    broken[2].write_bytes(b"\0" * 100 + kept[2][100:])
    plan, damaged = prepare(tree, tmp_path / "data", shard_bytes=1000)
    assert [line.split(" cannot be")[0] for line in damaged] == [
        f"{tree}: {file.relative_to(tree).as_posix()}" for file in broken
    ]
    assert all("\n" not in line for line in damaged) and not plan.is_done
    for file, content in zip(broken, kept, strict=True):
        file.write_bytes(content)
    prepare(tree, tmp_path / "data", shard_bytes=1000)
    whole, _ = prepare(tree, tmp_path / "whole", shard_bytes=1000)
    assert bytes_of(plan.directory) == bytes_of(whole.directory)


def test_what_is_there_already_is_left_alone(tree, tmp_path, refusal):
    plan, _ = prepare(tree, tmp_path / "data")
    before = contents(tmp_path / "data")
    assert preparing.plan("tiny", str(tree), str(tmp_path / "data")).is_done
    assert contents(tmp_path / "data") == before
    (tree / "train" / "cat" / "images" / "cat_9.JPEG").write_bytes(jpeg(99))
    other = preparing.plan("tiny", str(tree), str(tmp_path / "data"))
    message = refusal(lambda: other.is_done)
    assert "holds a data set that was prepared of other files" in message
    (tree / "train" / "cat" / "images" / "cat_9.JPEG").unlink()
    plan.all_shards[0].file.unlink()
    assert "is missing: remove" in refusal(lambda: plan.is_done)


@pytest.mark.parametrize("name", ["Tiny", "tiny-imagenet", "../tiny", "", "2tiny", "a__b"])
def test_a_name_that_tfds_would_not_take(refusal, tree, tmp_path, name):
    assert "--dataset=" in refusal(preparing.plan, name, str(tree), str(tmp_path))


def test_splits_may_be_named_and_must_have_classes(refusal, tree, tmp_path):
    plan = preparing.plan("tiny", str(tree), str(tmp_path), ["val"])
    assert list(plan.splits.images) == ["val"]
    message = refusal(preparing.plan, "tiny", str(tree), str(tmp_path), ["train", "test"])
    assert "test/images" in message and "'train' lacks" in message
    shutil.rmtree(tree / "train")
    assert "no split 'train'" in refusal(preparing.plan, "tiny", str(tree), str(tmp_path))


def test_the_library_that_writes_them_may_be_missing(refusal, tree, tmp_path, monkeypatch):
    plan = preparing.plan("tiny", str(tree), str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install -e '.[tfds]'" in refusal(preparing.write, plan)


def test_prepared_in_a_bucket(bucket, tree, tmp_path):
    settings = {"name": "tiny", "source": str(tree), "shard_bytes": 2000}
    here, there = (
        preparing.plan(data_dir=str(place), **settings) for place in (tmp_path / "data", bucket)
    )
    for plan in (here, there):
        assert not plan.is_done and preparing.write(plan) == [] and plan.is_done
    names = {file.name for file in here.directory.iterdir()}
    assert {file.name for file in there.directory.iterdir()} == names and len(names) > 6
    for name in names:
        assert (there.directory / name).read_bytes() == (here.directory / name).read_bytes()
    for stream in (False, True):
        found, expected = (
            load("tfds:tiny", str(place), 4, test_split="val", stream=stream)
            for place in (bucket, tmp_path / "data")
        )
        np.testing.assert_array_equal(found.train.images, expected.train.images)
        np.testing.assert_array_equal(found.train.labels, expected.train.labels)
    (bucket / "tiny/1.0.0" / there.all_shards[0].file.name).unlink()
    with pytest.raises(UserError, match=r"is missing: remove gs://bucket/runs/tiny/1\.0\.0"):
        _ = there.is_done


def test_nothing_is_prepared_in_a_bucket(bucket):
    with pytest.raises(UserError, match="tfds:tiny is not prepared in gs://bucket/runs: prepare"):
        load("tfds:tiny", str(bucket))
