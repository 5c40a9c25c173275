"""APGD's schedule against sequences computed by hand."""

import numpy as np
import pytest

from advmoe_jax.attacks.schedule import checkpoints, should_halve, sparsify, timetable, windows


def test_checkpoints_of_100_steps():
    # p: 0, .22, .41 (+.19), .57 (+.16), .70 (+.13), .80 (+.10), .87 (+.07), .93 (+.06), .99
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)


def test_checkpoints_round_up():
    assert checkpoints(50) == (11, 21, 29, 35, 40, 44, 47, 50)
    assert checkpoints(10) == (3, 5, 6, 7, 8, 9, 10)
    assert checkpoints(1) == (1,)


def test_windows_are_the_steps_between():
    result = windows((2, 5, 6), 7)
    np.testing.assert_array_equal(result, [0, 0, 2, 0, 0, 3, 1, 0])
    hundred = windows(checkpoints(100), 100)
    np.testing.assert_array_equal(hundred[hundred > 0], [22, 19, 16, 13, 10, 7, 6, 6])


@pytest.mark.parametrize(
    ("raised", "window", "halved_before", "before", "best", "expected"),
    [
        # Three of four steps must raise the loss: 16.5 of 22.
        (16, 22, False, 1.0, 2.0, True),
        (17, 22, False, 1.0, 2.0, False),
        (12, 16, False, 1.0, 2.0, False),  # exactly 75% is enough
        (11, 16, False, 1.0, 2.0, True),
        # The step was not halved and the best loss is the same: condition 2.
        (16, 16, False, 2.0, 2.0, True),
        # After a halving the same stagnation is forgiven once.
        (16, 16, True, 2.0, 2.0, False),
        (0, 16, True, 2.0, 3.0, True),
        # Between checkpoints nothing happens.
        (0, 0, False, 2.0, 2.0, False),
    ],
)
def test_halving(raised, window, halved_before, before, best, expected):
    given = [np.array([v]) for v in (raised, window, halved_before, before, best)]
    assert bool(should_halve(*given)[0]) is expected


def test_sparsity_of_l1():
    # 100 of 200 pixels before, 80 now: sparser, so begin again with a long step on 80/200/1.5.
    density, step, again = sparsify(np.array([80.0]), np.array([100.0]), 200, np.array([2.0]), 12.0)
    np.testing.assert_allclose(density, 80 / 200 / 1.5)
    assert again[0] and step[0] == 12
    # 96 of 100: not sparser by 5%, so a step shorter by 1.5, but never below a tenth of the first.
    _, step, again = sparsify(np.array([96.0]), np.array([100.0]), 200, np.array([6.0]), 12.0)
    assert not again[0] and step[0] == 4
    assert sparsify(np.array([96.0]), np.array([100.0]), 200, np.array([1.5]), 12.0)[1][0] == 1.2


def test_the_three_balls_of_l1():
    """30, 30 and 40% of the steps, and one look more in each; checkpoints every 4% of its own."""
    plan = timetable(100, sparse=True, shrinking=True)
    np.testing.assert_array_equal(plan.radius, np.repeat([3, 2, 1], [31, 31, 41]))
    np.testing.assert_array_equal(plan.step, [*range(31), *range(31), *range(41)])
    np.testing.assert_array_equal(np.flatnonzero(plan.is_last), [30, 61])
    np.testing.assert_array_equal(plan.window, plan.step > 0)
    long = timetable(1000, sparse=True, shrinking=True)
    np.testing.assert_array_equal(np.flatnonzero(long.window[:301]), range(12, 301, 12))
    for steps in (1, 2, 3, 4, 7, 11):
        few = timetable(steps, sparse=True, shrinking=True)
        assert few.radius[-1] == 1 and (few.step > 0).sum() == steps


def test_one_ball_is_one_run():
    plan = timetable(100)
    assert np.all(plan.radius == 1) and not plan.is_last.any()
    np.testing.assert_array_equal(plan.window, windows(checkpoints(100), 100))
