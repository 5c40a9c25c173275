"""Square: its patches and schedule, and that it only ever improves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import l1, l2, linf, margin, square
from advmoe_jax.attacks.square import _pyramid_pair, _squares, patch_shares, square_steps
from advmoe_jax.attacks.stepwise import Batch

BALLS = {"linf": linf(0.1), "l2": l2(0.6), "l1": l1(3.0)}


def test_schedule_of_10000_queries():
    shares = patch_shares(10_000, 0.8, True)
    at = [0, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999]
    halvings = [0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    np.testing.assert_allclose(shares[at], 0.8 / 2.0 ** np.array(halvings))


def test_schedule_is_squeezed_or_not():
    squeezed = patch_shares(5000, 0.8, True)
    np.testing.assert_allclose(squeezed, patch_shares(10_000, 0.8, True)[::2])
    np.testing.assert_allclose(patch_shares(300, 0.8, False), patch_shares(10_000, 0.8, True)[:300])


def test_a_square_of_the_right_size_at_the_edge_of_the_ball():
    clean = jnp.full((8, 8, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 40)
    square_of = partial(_squares, linf(0.1), share=jnp.float32(0.14), images=clean, clean=clean)
    changed = jax.jit(jax.vmap(lambda key: square_of(key=key)))(keys)
    corners = set()
    for image in np.asarray(changed):
        rows, columns = np.nonzero(image[..., 0] != 0.5)
        # sqrt(0.14 * 64) = 2.99
        assert len(rows) == 9 and np.ptp(rows) == np.ptp(columns) == 2
        patch = image[rows[0] : rows[0] + 3, columns[0] : columns[0] + 3]
        np.testing.assert_allclose(np.abs(patch - 0.5), 0.1, atol=1e-6)
        assert np.all(patch == patch[0, 0])
        corners.add((rows[0], columns[0]))
    assert len(corners) > 15 and {max(c) for c in corners} >= {5}


@pytest.mark.parametrize(("order", "decay"), [(2, 2), (1, 4)])
def test_pyramids_by_hand(order, decay):
    # Upper half, 2 rows by 4 columns: rings around (1, 2) of three nested rectangles.
    one, two, three = (1 / r**decay for r in (1, 2, 3))
    upper = np.array([[three, three + two, three + two, three + two]] * 2)
    upper[1, 2] = three + two + one
    pair = np.concatenate([upper, -upper])
    expected = pair / np.linalg.norm(pair.ravel(), ord=order)
    rows = jnp.arange(4)
    pair_of = jax.jit(lambda rows, columns: _pyramid_pair(rows, columns, jnp.asarray(4), 8, order))
    got = pair_of(rows, rows)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    # Outside of the window there is nothing.
    wide = pair_of(jnp.arange(-2, 6), jnp.arange(-1, 7))
    np.testing.assert_allclose(wide[2:6, 1:5], expected, atol=1e-6)
    assert np.sum(np.abs(wide)) == pytest.approx(np.sum(np.abs(expected)), rel=1e-5)


@pytest.mark.parametrize(
    "norm", ["linf", *(pytest.param(n, marks=pytest.mark.slow) for n in ("l2", "l1"))]
)
def test_only_ever_improves_and_stays_inside(networks, assert_valid, norm):
    network, threat = networks["standard"], BALLS[norm]
    images, labels = network.images[:100], network.labels[:100]
    values = []
    for queries in (1, 300):
        attack = square(threat, num_queries=queries, rescale_schedule=False)
        result = jax.jit(partial(attack, network.function))(images, labels, jax.random.key(0))
        assert_valid(threat, result, images)
        values.append(np.mean(margin(network.function(result), labels)))
    assert values[0] < values[1]
    assert network.accuracy(result) < network.accuracy(images) - 0.1


@pytest.mark.parametrize("norm", ["linf", "l1", pytest.param("l2", marks=pytest.mark.slow)])
def test_most_proposals_of_the_walk_use_the_whole_ball(norm):
    """Away from the ends of the pixel range every image tried lies on the sphere."""
    threat = BALLS[norm]._replace(lower=-10, upper=10)
    clean = jnp.full((6, 10, 10, 2), 0.5)

    def brighter(x):
        return jnp.stack([jnp.zeros(6), jnp.sum(x**2, axis=(1, 2, 3)) - 1e6], axis=1)

    batch = Batch(clean, *3 * [jnp.zeros(6, jnp.int32)], jax.random.split(jax.random.key(0), 6))
    steps = square_steps(threat, num_queries=20)
    state = jax.jit(steps.begin)(batch)
    advance = jax.jit(partial(steps.step, brighter))
    for _ in range(20):
        delta = np.asarray(state.adversarial - clean, np.float64).reshape(6, -1)
        size = np.linalg.norm(delta, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
        np.testing.assert_allclose(size, threat.epsilon, rtol=1e-4)
        state = advance(batch, state)


@pytest.mark.slow
def test_targeted_and_other_pixel_ranges(networks, assert_valid):
    network = networks["standard"]
    wanted = (network.labels + 1) % 10
    threat = linf(0.4 * 255, -100.0, 155.0)
    attack = square(threat, num_queries=300, targeted=True)
    images = network.images * 255 - 100
    result = jax.jit(partial(attack, lambda x: network.function((x + 100) / 255)))(
        images, wanted, jax.random.key(0)
    )
    assert_valid(threat, result, images)
    assert np.mean(np.argmax(network.function((result + 100) / 255), axis=1) == wanted) > 0.5


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"p=1.5 in \(0, 1\]"):
        square(linf(0.1), p=1.5)
    with pytest.raises(ValueError, match=r"needs images \[B, H, W, C\], not \(2, 5\)"):
        square(linf(0.1))(lambda x: x, jnp.zeros((2, 5)), jnp.zeros(2, int), jax.random.key(0))
