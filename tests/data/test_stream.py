"""Batches that the host makes are those that the device would take."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from advmoe_jax.data import preparing
from advmoe_jax.data import stream as stream_module
from advmoe_jax.data.batch import BatchRecipe, Mixture, epoch_order, training_batch
from advmoe_jax.data.decoding import Encoded
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.pipeline import Resident
from advmoe_jax.data.sources import Split, load
from advmoe_jax.data.stream import Placement, Stream
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import DATA_AXIS, data_mesh, parallel

BATCH, IMAGES = 16, 40
MIXED = Mixture(8, extra_per_batch=3, cutmix=0.9, num_classes=IMAGES)


def make_split():
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), np.uint8)
    return Split(images, np.arange(IMAGES, dtype=np.int32))


@pytest.mark.parametrize(
    ("devices", "mixture"),
    [(1, Mixture()), (8, MIXED), pytest.param(1, MIXED, marks=pytest.mark.slow)],
)
def test_streamed_batches_are_the_resident_ones(devices, mixture):
    mesh, split, key = data_mesh(devices), make_split(), jax.random.key(9)
    recipe = BatchRecipe(BATCH, 2, True, mixture)
    stream, resident = (kind(split, mesh, recipe) for kind in (Stream, Resident))
    assert stream.size == resident.size == IMAGES
    assert stream.steps_per_epoch == resident.steps_per_epoch == 2
    order_key = jax.random.key(1)
    order = epoch_order(order_key, 10, stream.images_per_epoch)

    def batch(feed, data, step):
        def function(data, step):
            own = jax.random.fold_in(key, step)
            return training_batch(feed.reader, data, order, step - 20, own, recipe, DATA_AXIS)

        specs = {"in_specs": (feed.spec, PartitionSpec()), "out_specs": PartitionSpec(DATA_AXIS)}
        return parallel(function, mesh, **specs)(data, jnp.int32(step))

    count = 0
    # The run's epoch that begins at step 20, gone on with from its second batch.
    for i, data in enumerate(stream.batches(order_key, key, start=21, stop=22), start=21):
        found, expected = batch(stream, data, i), batch(resident, resident.data, i)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(*(jax.random.key_data(x[2]) for x in (found, expected)))
        assert jax.tree.map(lambda x: x.shape, data) == jax.tree.map(
            lambda x: x.shape, stream.shapes
        )
        count += 1
    assert count == 1


def test_batches_are_made_ahead_in_order_and_abandoned_without_waiting():
    split = make_split()
    stream = Stream(split, data_mesh(1), BatchRecipe(4))
    keys = jax.random.key(3), jax.random.key(0)
    order = np.asarray(epoch_order(keys[0], 0, IMAGES))
    batches = stream.batches(*keys, 0, 10)
    first, second = next(batches), next(batches)
    np.testing.assert_array_equal(first.labels, order[:4])
    np.testing.assert_array_equal(second.labels, order[4:8])
    np.testing.assert_array_equal(second.images, split.images[order[4:8]])
    batches.close()
    assert len(list(stream.batches(*keys, 7, 10))) == 3


def test_a_run_is_streamed_on_from_any_step_however_it_is_cut_into_stretches(monkeypatch):
    stream = Stream(make_split(), data_mesh(1), BatchRecipe(12))  # three steps an epoch
    keys = jax.random.key(3), jax.random.key(0)
    whole = [np.asarray(batch.labels) for batch in stream.batches(*keys, 0, 9)]
    for epoch in range(3):
        order = np.asarray(epoch_order(keys[0], epoch, IMAGES))
        np.testing.assert_array_equal(np.concatenate(whole[3 * epoch : 3 * epoch + 3]), order[:36])
    for at_once in (1, 72):  # images: stretches of one epoch, and of two
        monkeypatch.setattr(stream_module, "_INDICES_AT_ONCE", at_once)
        for start, stop in ((0, 9), (4, 9), (4, 5), (9, 9)):
            found = [np.asarray(batch.labels) for batch in stream.batches(*keys, start, stop)]
            np.testing.assert_array_equal(
                np.reshape(found, (-1, 12)), np.reshape(whole[start:stop], (-1, 12))
            )


def test_an_image_that_cannot_be_read_ends_in_its_own_error():
    class Broken:
        shape = (IMAGES, 4, 4, 3)

        def __getitem__(self, indices):
            raise UserError("7.png cannot be decoded")

    split = Split(Broken(), np.zeros(IMAGES, np.int32))
    stream = Stream(split, data_mesh(1), BatchRecipe(4))
    with pytest.raises(UserError, match=r"7\.png"):
        next(stream.batches(jax.random.key(0), jax.random.key(0), 0, 10))


def jpegs(folder, count=24, size=8):
    """(files' split still encoded, the same decoded): 8x8 JPEGs of three classes."""
    items = []
    for i in range(count):
        file = folder / f"{i}.jpg"
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + 4, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        items.append(Encoded(str(file), i % 3, file))
    encoded = EncodedImages(items, (size, size, 3), size)
    labels = np.array([item.label for item in items], np.int32)
    return Split(encoded, labels), Split(np.asarray(encoded), labels)


def streamed(split, recipe, workers, start=0, stop=6, mesh=None):
    """Images and labels of those steps, uint8 and int32, and what a step makes of them."""
    stream = Stream(split, mesh or data_mesh(1), recipe, workers)
    keys = jax.random.key(3), jax.random.key(4)
    return [jax.tree.map(np.asarray, tuple(b)) for b in stream.batches(*keys, start, stop)]


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for part, other_part in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, other_part)


@pytest.fixture
def grain():
    return pytest.importorskip("grain")


def test_workers_make_the_batches_of_threads_from_any_step(tmp_path, grain):
    encoded, decoded = jpegs(tmp_path)
    recipe = BatchRecipe(8)  # three steps an epoch
    expected = streamed(decoded, recipe, 0)
    assert_same(streamed(encoded, recipe, 0), expected)
    assert_same(streamed(encoded, recipe, 3, start=2), expected[2:])


@pytest.mark.slow
def test_a_worker_names_the_image_that_it_cannot_decode(tmp_path, grain):
    encoded, _ = jpegs(tmp_path)
    (tmp_path / "7.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"7\.jpg cannot be decoded"):
        streamed(encoded, BatchRecipe(8), 1)


def test_without_grain_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    split, _ = jpegs(tmp_path, count=2)
    with pytest.raises(UserError, match=r"data\.workers=2 needs grain.*advmoe_jax\[grain\]"):
        Stream(split, data_mesh(1), BatchRecipe(2), workers=2)
    assert len(streamed(split, BatchRecipe(2), 0, stop=1)) == 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_make_their_own_parts_of_the_same_batches(tmp_path, monkeypatch, processes):
    """Devices are dealt out to processes as they would be on several hosts."""
    encoded, _ = jpegs(tmp_path)
    recipe = BatchRecipe(8, crop_area=0.2, crop_whole=True)
    expected = streamed(encoded, recipe, 0)
    mesh, keys = data_mesh(4), (jax.random.key(3), jax.random.key(4))
    parts = []
    for process in range(processes):
        made = []

        class OfProcess(Placement):
            def __init__(self, mesh, batch_size, process=process):
                super().__init__(mesh, batch_size)
                self.positions = np.split(self.positions, processes)[process]

            def put(self, images, labels, made=made):
                made.append((images, labels))

        monkeypatch.setattr(stream_module, "Placement", OfProcess)
        list(Stream(encoded, mesh, recipe).batches(*keys, 0, 6))
        parts.append(made)
    steps = zip(*parts, strict=True)
    joined = [[np.concatenate(p) for p in zip(*step, strict=True)] for step in steps]
    assert_same(joined, expected)


def test_devices_get_their_own_parts_of_a_streamed_batch(tmp_path):
    encoded, _ = jpegs(tmp_path)
    one, four = (streamed(encoded, BatchRecipe(8), 0, mesh=data_mesh(n)) for n in (1, 4))
    assert_same(four, one)


def test_crops_of_whole_images_follow_from_the_step_and_the_place(tmp_path):
    encoded, _ = jpegs(tmp_path)
    recipe = BatchRecipe(8, crop_area=0.2, crop_whole=True)
    whole = streamed(encoded, recipe, 0)
    assert_same(streamed(encoded, recipe, 0, start=4), whole[4:])
    centred = streamed(encoded, BatchRecipe(8), 0)
    for found, plain in zip(whole, centred, strict=True):
        np.testing.assert_array_equal(found[1], plain[1])
        assert all(not np.array_equal(*pair) for pair in zip(found[0], plain[0], strict=True))


@pytest.mark.slow
@pytest.mark.skipif("ADVMOE_DATA" not in os.environ, reason="ADVMOE_DATA names no folder")
def test_cifar10_resident_streamed_and_by_workers(tmp_path, grain):
    """Prepared with our own builder; one epoch's first batches, and those of a later one."""
    archive = Path(os.environ["ADVMOE_DATA"]) / "cifar10_jpeg.tar.gz"
    plan = preparing.plan("cifar10_jpeg", str(archive), str(tmp_path), ["test", "train"])
    plan.directory.mkdir(parents=True)
    assert preparing.write(plan) == []
    resident = load("image_folder", str(archive))
    prepared = load("tfds:cifar10_jpeg", str(tmp_path), stream=True)
    recipe, mesh = BatchRecipe(128, 4, True), data_mesh(1)
    for start in (0, 390 * 3 + 7):
        expected = streamed(resident.train, recipe, 0, start, start + 4)
        for workers in (0, 1, 3):
            assert_same(streamed(prepared.train, recipe, workers, start, start + 4), expected)
    keys = jax.random.key(3), jax.random.key(4)
    order = np.asarray(epoch_order(keys[0], 3, 50_000))[7 * 128 : 8 * 128]
    whole = Resident(resident.train, mesh, recipe).data
    np.testing.assert_array_equal(expected[0][0], np.asarray(whole.images)[order])
