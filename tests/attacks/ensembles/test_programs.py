"""Programs and the arrays they hold, batch sizes, padding."""

import gc
import weakref

import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks.ensembles.programs import Outputs, device_for, in_batches, size_for


def test_a_closure_is_forgotten_with_its_device():
    """With it goes what was compiled for it alone, and the arrays that it holds."""
    array = jnp.arange(3.0)

    def closure(images):
        return images * array

    device = device_for(closure)
    rows = np.ones((2, 3), np.float32), np.zeros((2, 2), np.uint32)
    found = device.run(Outputs(0, "threefry2x32"), rows)
    np.testing.assert_array_equal(found, [[0, 1, 2]] * 2)
    gone = weakref.ref(closure)
    del closure, device
    gc.collect()
    assert gone() is None


def test_sizes():
    found = {n: size_for(n, 512) for n in (2000, 512, 257, 256, 130, 29, 1, 0)}
    assert found == {2000: 512, 512: 512, 257: 288, 256: 256, 130: 144, 29: 32, 1: 16, 0: 16}
    assert [size_for(n, 64) for n in (33, 32, 1)] == [40, 32, 16]  # not less than 8 apart
    assert [size_for(n, 240, 24) for n in (30, 1)] == [48, 24]
    assert size_for(251, 100) == 88  # three batches
    assert [size_for(n, 5) for n in (3, 7)] == [5, 5]
    assert size_for(17, 16, 16) == 16
    assert all(n <= size_for(n, 5000) <= 1.125 * n for n in range(64, 5000))


def test_the_last_batch_is_padded():
    seen = []

    def double(rows):
        seen.append(len(rows))
        return 2 * rows

    np.testing.assert_array_equal(in_batches(double, (np.arange(7),), 3), 2 * np.arange(7))
    assert seen == [3, 3, 3]
