"""Batches that the host makes are those that the device would take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from advmoe_jax.data import pipeline
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Stream
from advmoe_jax.errors import UserError
from advmoe_jax.parallel import DATA_AXIS, data_mesh, parallel

BATCH, IMAGES = 16, 40
MIXED = pipeline.Mixture(8, extra_per_batch=3, cutmix=0.9, num_classes=IMAGES)


def make_split():
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), np.uint8)
    return Split(images, np.arange(IMAGES, dtype=np.int32))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("mixture", [pipeline.Mixture(), MIXED])
def test_streamed_batches_are_the_resident_ones(devices, mixture):
    mesh, split, key = data_mesh(devices), make_split(), jax.random.key(9)
    order = pipeline.permutation(jax.random.key(1), mixture.own_images(Split(*split)))
    stream = Stream(split, mesh, BATCH, mixture)

    def batch(streamed):
        def function(data, step):
            return pipeline.training_batch(
                data, order, step - 20, BATCH, jax.random.fold_in(key, step), 2, True, DATA_AXIS,
                mixture, streamed,
            )  # fmt: skip

        spread, everywhere = PartitionSpec(DATA_AXIS), PartitionSpec()
        specs = (spread if streamed else everywhere, everywhere)
        return parallel(function, mesh, in_specs=specs, out_specs=spread)

    resident, count = pipeline.put(split, mesh), 0
    # An epoch that begins at step 20 of the run, gone on with from its second batch.
    for i, data in enumerate(stream.batches(order, key, 20, start=1, stop=2), start=21):
        found = batch(True)(data, jnp.int32(i))
        expected = batch(False)(resident, jnp.int32(i))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(*(jax.random.key_data(x[2]) for x in (found, expected)))
        assert jax.tree.map(lambda x: x.shape, data) == jax.tree.map(
            lambda x: x.shape, stream.batch_shapes()
        )
        count += 1
    assert count == 1


def test_batches_are_made_ahead_in_order_and_abandoned_without_waiting():
    split = make_split()
    stream = Stream(split, data_mesh(1), 4, pipeline.Mixture())
    order = jnp.arange(IMAGES, dtype=jnp.int32)[::-1]
    batches = stream.batches(order, jax.random.key(0), 0, 0, 10)
    first, second = next(batches), next(batches)
    np.testing.assert_array_equal(first.labels, [39, 38, 37, 36])
    np.testing.assert_array_equal(second.labels, [35, 34, 33, 32])
    np.testing.assert_array_equal(second.images, split.images[[35, 34, 33, 32]])
    batches.close()
    assert len(list(stream.batches(order, jax.random.key(0), 0, 7, 10))) == 3


def test_an_image_that_cannot_be_read_ends_in_its_own_error():
    class Broken:
        shape = (IMAGES, 4, 4, 3)

        def __getitem__(self, indices):
            raise UserError("7.png cannot be decoded")

    stream = Stream(
        Split(Broken(), np.zeros(IMAGES, np.int32)), data_mesh(1), 4, pipeline.Mixture()
    )
    with pytest.raises(UserError, match=r"7\.png"):
        next(stream.batches(jnp.arange(IMAGES), jax.random.key(0), 0, 0, 10))
