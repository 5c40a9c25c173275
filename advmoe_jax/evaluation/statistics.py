"""Means over seeds, with Student's t intervals.

Seeds are few, so the normal distribution would make intervals far too narrow: with three of them
the factor is 4.30, not 1.96.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values, in their unit.
        half_width: the interval is ``mean`` plus and minus this; None where there is but one value.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate | None:
    """Mean and its two-sided interval by Student's t, of independent values; None if there is none.

    Args:
        values: one per seed.
        level: how often such an interval covers the true mean, if the values are normal.
    """
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    # A second's import, for those who have something to compare.
    from scipy.stats import t

    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    factor = float(t.ppf((1 + level) / 2, count - 1))
    return Estimate(mean, factor * math.sqrt(variance / count), count)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL
) -> Estimate | None:
    """``estimate`` of ``values - reference``, seed by seed; None if they share no seed.

    Runs of one seed share the split into training and validation images and the order of batches;
    what these do to both cancels.

    Args:
        values: by seed.
        reference: by seed; seeds that only one of both has are left out.
        level: see ``estimate``.
    """
    shared = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in shared], level)
