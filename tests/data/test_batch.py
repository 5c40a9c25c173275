"""One batch, made inside jit: which images, how augmented, the same on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from advmoe_jax.data.augment import to_float
from advmoe_jax.data.batch import (
    BatchRecipe,
    Mixture,
    batch_indices,
    permutation,
    shard_of,
    take,
    training_batch,
)
from advmoe_jax.data.pipeline import Resident, put
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError

READER = Resident.reader
MAKE = jax.jit(training_batch, static_argnums=(0, 5, 6))  # not op by op


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def make_split(num_images=40, size=4, channels=3):
    images = np.random.default_rng(0).integers(1, 256, (num_images, size, size, channels), np.uint8)
    return Split(images, np.arange(num_images, dtype=np.int32))


def key_bits(keys):
    return [tuple(bits) for bits in np.asarray(jax.random.key_data(keys)).tolist()]


def test_take():
    split = make_split()
    images, labels = take(put(split), jnp.array([3, 39, 0], jnp.int32))
    np.testing.assert_array_equal(images, split.images[[3, 39, 0]])
    np.testing.assert_array_equal(labels, [3, 39, 0])
    assert images.dtype == np.uint8 and labels.dtype == np.int32


def shards(mesh, batch_size):
    return jax.shard_map(
        lambda: shard_of(batch_size, "data"),
        mesh=mesh,
        in_specs=(),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )()


def test_shards_are_contiguous_parts_of_the_batch(mesh):
    positions = shards(mesh, 24)
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, np.arange(24))
    assert {shard.data.shape for shard in positions.addressable_shards} == {(3,)}
    np.testing.assert_array_equal(shard_of(24, None), np.arange(24))


def test_a_batch_that_devices_cannot_share_is_refused(mesh):
    with pytest.raises(UserError, match=r"batch of 20 .* 8 devices"):
        shards(mesh, 20)


def test_an_epoch_takes_each_image_of_its_full_batches_once():
    split = make_split(num_images=11)
    data, order = put(split), permutation(jax.random.key(5), 11)
    # One compilation serves every step: the step and the key are traced.
    batch = jax.jit(
        lambda step, key: training_batch(READER, data, order, step, key, BatchRecipe(4))
    )
    taken = [batch(step, jax.random.key(step)) for step in range(2)]
    expected = np.asarray(order)[:8]
    np.testing.assert_array_equal(np.concatenate([labels for _, labels, _ in taken]), expected)
    images = np.concatenate([images for images, _, _ in taken])
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, to_float(split.images[expected]))


MIXED = Mixture(8, extra_per_batch=3, cutmix=0.9, num_classes=40)


@pytest.mark.parametrize(
    ("crop_padding", "flip", "mixture"),
    [
        (2, True, Mixture()),
        (0, True, Mixture()),
        (2, False, Mixture()),
        pytest.param(2, True, MIXED, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_produce_exactly_what_one_does(mesh, crop_padding, flip, mixture):
    split = make_split()
    order = permutation(jax.random.key(1), 40 - mixture.extra_images)
    step, key = jnp.int32(1), jax.random.key(9)
    recipe = BatchRecipe(16, crop_padding, flip, mixture)

    def batch(axis_name):
        def function(data, order, step, key):
            return training_batch(READER, data, order, step, key, recipe, axis_name)

        return function

    alone = jax.jit(batch(None))(put(split), order, step, key)
    together = jax.jit(
        jax.shard_map(
            batch("data"),
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
    )(put(split, mesh), order, step, key)
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together[1], alone[1])
    assert key_bits(together[2]) == key_bits(alone[2])
    assert {shard.data.shape for shard in together[0].addressable_shards} == {(2, 4, 4, 3)}
    # and the augmentation did something
    plain = to_float(split.images[np.asarray(order)[16:32]])
    assert not np.array_equal(alone[0], plain)


EXTRA = 7


@pytest.fixture(scope="module")
def mixed_epoch():
    """(indices, batches) of an epoch of 13 images and 7 extra ones, 3 of 8 in every batch."""
    split = make_split(num_images=13 + EXTRA)  # an image's label is its index
    data, order = put(split), permutation(jax.random.key(5), 13)
    mixture = Mixture(EXTRA, extra_per_batch=3)
    batch = jax.jit(
        lambda step, key: training_batch(
            READER, data, order, step, key, BatchRecipe(8, mixture=mixture)
        )
    )
    batches = [batch(step, jax.random.key(step)) for step in range(2)]
    return split, order, batches


def test_every_batch_has_its_share_of_extra_images(mixed_epoch):
    split, order, batches = mixed_epoch
    own = []
    for images, labels, _ in batches:
        indices = np.asarray(labels)
        np.testing.assert_array_equal(images, to_float(split.images[indices]))
        is_extra = indices >= 13
        np.testing.assert_array_equal(is_extra, [0, 0, 1, 0, 0, 1, 0, 1])
        own += indices[~is_extra].tolist()
    assert own == np.asarray(order)[:10].tolist()
    drawn = [i for _, labels, _ in batches for i in np.asarray(labels) if i >= 13]
    assert len(set(drawn)) > 2


@pytest.mark.parametrize(("batch_size", "count"), [(8, 3), (64, 45), (10, 1), (10, 9)])
def test_extra_images_are_spread_evenly(batch_size, count):
    positions = np.arange(batch_size)
    mixture = Mixture(5, extra_per_batch=count)
    order = jnp.arange(100, dtype=jnp.int32)
    recipe = BatchRecipe(batch_size, mixture=mixture)
    draw = jax.jit(batch_indices, static_argnums=(1, 3))
    indices = draw(order, 0, jax.random.key(0), recipe, positions)
    is_extra = np.asarray(indices) >= 100
    assert is_extra.sum() == count and indices.max() < 105
    np.testing.assert_array_equal(indices[~is_extra], np.arange(batch_size - count))
    for start in range(0, batch_size, 4):  # any run of images has its part of them
        part = is_extra[start : start + 4]
        assert abs(part.sum() - len(part) * count / batch_size) < 1


@pytest.mark.parametrize("probability", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_cutmix_labels_are_the_shares_of_the_pixels(probability):
    # Images of one colour each, which tells in every pixel whose it is.
    labels = np.arange(40, dtype=np.int32) % 10
    images = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 8, 8, 1))
    data, order = put(Split(images, labels)), jnp.arange(40, dtype=jnp.int32)
    mixture = Mixture(cutmix=probability, num_classes=10)
    make = jax.jit(
        lambda key: training_batch(READER, data, order, 0, key, BatchRecipe(32, 0, True, mixture))
    )
    mixed, soft, _ = make(jax.random.key(3))
    whose = np.rint(np.asarray(mixed)[..., 0] * 255).astype(int)
    expected = np.stack([np.eye(10)[labels[pixels]].mean(axis=(0, 1)) for pixels in whose])
    np.testing.assert_allclose(soft, expected, atol=1e-6)
    partners = [set(pixels.ravel()) - {i} for i, pixels in enumerate(whose)]
    assert all(len(p) <= 1 for p in partners)
    cut = sum(len(p) for p in partners)
    assert cut > 20 if probability == 1 else 6 < cut < 22


def test_mixup_averages_two_images_and_their_labels():
    # Image i is of the one colour 6 i, and of the class i: both tell the shares.
    labels = np.arange(40, dtype=np.int32)
    colours = (6 * labels).astype(np.uint8)[:, None, None, None]
    images = np.broadcast_to(colours, (40, 8, 8, 1))
    data, order = put(Split(images, labels)), jnp.arange(40, dtype=jnp.int32)
    recipe = BatchRecipe(32, mixture=Mixture(mixup=0.8, num_classes=40))
    make = jax.jit(lambda key: training_batch(READER, data, order, 0, key, recipe))
    mixed, soft, _ = make(jax.random.key(3))
    soft = np.asarray(soft)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(soft.argmax(axis=1), labels[:32])
    assert np.all(soft.max(axis=1) >= 0.5) and np.all(np.sum(soft > 0, axis=1) <= 2)
    assert np.sum(soft.max(axis=1) < 0.95) > 10
    expected = soft @ (6 * labels) / 255
    np.testing.assert_allclose(mixed[:, 3, 5, 0], expected, rtol=1e-5)
    assert np.ptp(np.asarray(mixed), axis=(1, 2, 3)).max() < 1e-6


def test_each_image_and_step_has_its_own_noise_key():
    data, order = put(make_split()), jnp.arange(40, dtype=jnp.int32)
    roots = [jax.random.key(0), jax.random.key(1)]
    drawn = [
        bits
        for root in roots
        for bits in key_bits(MAKE(READER, data, order, 0, root, BatchRecipe(16, 1, True))[2])
    ]
    derived = [
        bits
        for root in roots
        for i in range(16)
        for bits in key_bits(jax.random.fold_in(root, i)[None])
    ]
    assert len(set(drawn + derived)) == len(drawn) + len(derived) == 64


def test_another_key_augments_otherwise():
    data, order = put(make_split()), jnp.arange(40, dtype=jnp.int32)
    first, second = (
        MAKE(READER, data, order, 0, jax.random.key(seed), BatchRecipe(16, 1, True))[0]
        for seed in (0, 1)
    )
    assert not np.array_equal(first, second)


def test_a_batch_larger_than_the_data_is_refused():
    data, order = put(make_split()), jnp.arange(40, dtype=jnp.int32)
    with pytest.raises(UserError, match="batch of 64 is more than the 40 training images"):
        training_batch(READER, data, order, 0, jax.random.key(0), BatchRecipe(64))
