"""Images on the device: whole on each, an order of its own for each epoch."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe_jax.data import pipeline
from advmoe_jax.data.batch import BatchRecipe, Mixture, permutation
from advmoe_jax.data.sources import Split
from advmoe_jax.parallel import data_mesh


def make_split(num_images=40):
    images = np.random.default_rng(0).integers(1, 256, (num_images, 4, 4, 3), np.uint8)
    return Split(images, np.arange(num_images, dtype=np.int32))


def test_put_on_one_device():
    split = make_split()
    data = pipeline.put(split)
    assert data.images.dtype == np.uint8 and data.labels.dtype == np.int32
    assert len(data.images.devices()) == 1
    np.testing.assert_array_equal(data.images, split.images)
    np.testing.assert_array_equal(data.labels, split.labels)


def test_put_gives_each_device_of_the_mesh_the_whole_split():
    split, mesh = make_split(), data_mesh(8)
    data = pipeline.put(split, mesh)
    for array, original in zip(data, split, strict=True):
        assert array.sharding.is_fully_replicated and array.dtype == original.dtype
        assert {shard.device for shard in array.addressable_shards} == set(mesh.devices.flat)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, original)


def test_permutation_has_each_index_once_and_depends_on_the_key():
    draw = jax.jit(permutation, static_argnums=1)
    first, again, second = (draw(jax.random.key(seed), 100) for seed in (0, 0, 1))
    assert first.dtype == np.int32
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)


def test_every_step_of_an_epoch_reads_the_whole_split():
    feed = pipeline.Resident(make_split(20), data_mesh(1), BatchRecipe(8, mixture=Mixture(7, 3)))
    assert (feed.size, feed.images_per_epoch, feed.steps_per_epoch) == (20, 13, 2)
    read = list(feed.batches(jax.random.key(0), jax.random.key(1), start=3, stop=4))
    assert len(read) == 1 and read[0] is feed.data
    assert [(x.shape, x.dtype) for x in feed.shapes] == [(x.shape, x.dtype) for x in feed.data]


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(1, 50), batch_size=st.integers(1, 20))
def test_evaluation_sees_every_image_once_in_static_shapes(num_images, batch_size):
    batches = list(pipeline.evaluation_batches(num_images, batch_size))
    assert {indices.shape for indices, _ in batches} == {(batch_size,)}
    assert {indices.dtype for indices, _ in batches} == {np.dtype(np.int32)}
    seen = np.concatenate([indices[:valid] for indices, valid in batches])
    np.testing.assert_array_equal(seen, np.arange(num_images))
    for indices, valid in batches:
        assert valid >= 1
        assert set(indices[valid:].tolist()) <= {num_images - 1}
