"""Batches that the host makes are those that the device would take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from advmoe_jax.data import stream as stream_module
from advmoe_jax.data.batch import BatchRecipe, Mixture, epoch_order, training_batch
from advmoe_jax.data.pipeline import Resident
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Stream
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
