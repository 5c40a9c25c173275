import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from advmoe_jax.data.augment import (
    augment,
    cutmix_boxes,
    paste,
    random_crop,
    random_flip,
    resized_crop,
    to_float,
)

COMPILED = jax.jit(augment, static_argnums=(2, 3))  # not op by op


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def distinct(batch, height, width, channels, dtype=np.uint8):
    """Images in which no pixel is zero and neighbours differ, so that a movement shows."""
    size = batch * height * width * channels
    return (np.arange(size) % 251 + 1).astype(dtype).reshape(batch, height, width, channels)


def numpy_crop(image, padding, row, column):
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[row : row + height, column : column + width]


def crop_offset(image, moved, padding):
    """The one offset at which a numpy crop gives `moved`."""
    span = range(2 * padding + 1)
    found = [
        (row, column)
        for row in span
        for column in span
        if np.array_equal(numpy_crop(image, padding, row, column), moved)
    ]
    assert len(found) == 1
    return found[0]


def test_to_float_is_the_same_compiled_and_not():
    every = np.arange(256, dtype=np.uint8)
    result = np.asarray(jax.jit(to_float)(every))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, to_float(jnp.asarray(every)))
    np.testing.assert_array_equal(result, to_float(result))  # floats stay as they are
    np.testing.assert_allclose(result, np.arange(256) / 255, rtol=2e-7)
    assert result[0] == 0 and result[255] == 1 and np.all(np.diff(result) > 0)


@settings(max_examples=5, deadline=None)
@given(
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    channels=st.sampled_from([1, 3]),
    padding=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_crop_is_a_numpy_crop_of_the_padded_image(height, width, channels, padding, seed):
    images = distinct(3, height, width, channels)
    padding = min(padding, height - 1, width - 1)  # so that no crop is all zeros
    moved = random_crop(images, keys(3, seed), padding)
    assert moved.dtype == np.uint8 and moved.shape == images.shape
    for image, result in zip(images, np.asarray(moved), strict=True):
        crop_offset(image, result, padding)


def test_crop_offsets_are_uniform_over_all_of_them():
    image = distinct(1, 4, 5, 1)
    count = 900
    moved = np.asarray(random_crop(np.repeat(image, count, 0), keys(count), 1))
    offsets = [crop_offset(image[0], result, 1) for result in moved]
    counts = [offsets.count((row, column)) for row in range(3) for column in range(3)]
    assert sum(counts) == count
    assert min(counts) > 60 and max(counts) < 140  # 100 expected, four standard deviations


def test_crop_without_padding_does_nothing():
    images = jnp.asarray(distinct(2, 3, 3, 1))
    assert random_crop(images, keys(2), 0) is images


def test_flip_mirrors_about_half_of_the_images():
    image = distinct(1, 3, 4, 3)
    count = 400
    results = np.asarray(random_flip(np.repeat(image, count, 0), keys(count)))
    mirrored = [np.array_equal(result, image[0][:, ::-1]) for result in results]
    kept = [np.array_equal(result, image[0]) for result in results]
    assert np.all(np.logical_xor(mirrored, kept))
    assert 160 < sum(mirrored) < 240  # 200 expected, four standard deviations


def test_augment_crops_and_flips():
    image = distinct(1, 4, 4, 1)
    count = 64
    results = np.asarray(COMPILED(np.repeat(image, count, 0), keys(count), 1, True))
    possible = {
        (row, column, flip): numpy_crop(image[0], 1, row, column)[:, :: -1 if flip else 1].tobytes()
        for row in range(3)
        for column in range(3)
        for flip in (False, True)
    }
    seen = {result.tobytes() for result in results}
    assert seen <= set(possible.values())
    for flip in (False, True):  # crops with and without a flip
        assert len({possible[k] for k in possible if k[2] == flip} & seen) >= 5


def test_augment_switched_off_returns_the_images():
    images = distinct(4, 3, 3, 1)
    np.testing.assert_array_equal(COMPILED(images, keys(4), 0, False), images)


def test_flip_is_off_when_asked():
    images = distinct(16, 4, 4, 1)
    moved = np.asarray(COMPILED(images, keys(16), 1, False))
    offsets = {crop_offset(*pair, 1) for pair in zip(images, moved, strict=True)}
    assert 1 < len(offsets) <= 9


def test_float_images_move_exactly_as_bytes_do():
    images = distinct(16, 5, 4, 3)
    moved_bytes = COMPILED(images, keys(16), 2, True)
    moved_floats = COMPILED(to_float(images), keys(16), 2, True)
    assert moved_bytes.dtype == np.uint8 and moved_floats.dtype == np.float32
    np.testing.assert_array_equal(to_float(moved_bytes), moved_floats)


def test_an_image_depends_on_its_own_key_only():
    images, some_keys = distinct(8, 4, 4, 1), keys(8)
    whole = np.asarray(COMPILED(images, some_keys, 1, True))
    order = np.array([5, 0, 7])
    part = COMPILED(images[order], some_keys[order], 1, True)
    np.testing.assert_array_equal(part, whole[order])


@pytest.mark.parametrize("transform", ["jit", "vmap", "shard_map"])
def test_same_result_under_each_transform(transform):
    images, some_keys = jnp.asarray(distinct(16, 4, 4, 3)), keys(16)

    def function(images, keys):
        return augment(images, keys, 1, True)

    expected = function(images, some_keys)
    if transform == "jit":
        result = jax.jit(function)(images, some_keys)
    elif transform == "vmap":
        result = jax.vmap(function)(images.reshape(4, 4, 4, 4, 3), some_keys.reshape(4, 4))
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        split = PartitionSpec("data")
        sharded = jax.shard_map(
            function, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False
        )
        result = jax.jit(sharded)(images, some_keys)
    np.testing.assert_array_equal(np.asarray(result).reshape(16, 4, 4, 3), expected)


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_cutmix_boxes_are_the_papers(alpha):
    count, height, width = 60, 12, 20
    boxes = np.asarray(cutmix_boxes(keys(count), height, width, alpha))
    assert boxes.shape == (count, 4) and boxes.dtype == np.int32
    for key, (top, bottom, left, right) in zip(keys(count), boxes, strict=True):
        share_key, row_key, column_key = jax.random.split(key, 3)
        cut = np.sqrt(np.float32(1) - np.asarray(jax.random.beta(share_key, alpha, alpha)))
        for size, centre_key, first, last in (
            (height, row_key, top, bottom),
            (width, column_key, left, right),
        ):
            centre = int(jax.random.randint(centre_key, (), 0, size))
            half = int(size * cut) // 2
            assert first == max(centre - half, 0) and last == min(centre + half, size)
    # The mean area is half the image's, less what lies outside.
    areas = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    assert 0.15 < areas.mean() < 0.5 and areas.max() > 0.5 and areas.min() < 0.02


def test_paste_by_hand():
    images, others = distinct(3, 4, 5, 2), 255 - distinct(3, 4, 5, 2)
    boxes = np.array([[1, 3, 0, 2], [0, 4, 0, 5], [2, 2, 1, 3]], np.int32)
    expected = images.copy()
    expected[0, 1:3, 0:2] = others[0, 1:3, 0:2]
    expected[1] = others[1]
    mixed, share = paste(images, others, boxes)
    np.testing.assert_array_equal(mixed, expected)
    np.testing.assert_allclose(share, [1 - 4 / 20, 0, 1], rtol=1e-6)
    assert mixed.dtype == np.uint8


def test_a_resized_crop_is_a_rectangle_of_the_image():
    # An image that is linear in its coordinates stays linear, and says which rectangle is left.
    rows, columns = np.mgrid[:24, :16].astype(np.float32)
    image = np.stack([rows, columns], axis=-1)
    images = np.broadcast_to(image, (60, *image.shape))
    found = np.asarray(jax.jit(resized_crop, static_argnums=2)(images, keys(60), 0.25))
    assert found.shape == images.shape
    inner = found[:, 6:18, 4:12]  # away from the edges, beyond which there is nothing to mix
    steps = np.stack(
        [np.diff(inner[..., 0], axis=1)[:, 0, 0], np.diff(inner[..., 1], axis=2)[:, 0, 0]]
    )
    assert np.allclose(np.diff(inner[..., 0], axis=1), steps[0][:, None, None], atol=1e-4)
    area, ratio = steps[0] * steps[1], steps[0] * 24 / (steps[1] * 16)
    assert area.min() >= 0.24 and area.max() <= 1.0001 and np.ptp(area) > 0.4
    assert steps.max() <= 1.0001 and np.ptp(ratio) > 0.4
    assert found.min() >= -1e-4 and found[..., 0].max() <= 23 + 1e-3
    assert resized_crop(images, keys(60), 1) is images
    whole = resized_crop((10 * images).astype(np.uint8), keys(60), 0.5)
    assert whole.dtype == np.uint8
