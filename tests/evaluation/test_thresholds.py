"""When images leave: every rule, and what is said of a wrong one."""

import numpy as np
import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.thresholds import (
    by_accuracy,
    by_macs,
    by_quotas,
    exits_taken,
    parse_rule,
)

N, SIDE = 1003, 4
MACS = (10, 25, 30, 60, 100)


@pytest.fixture(scope="module")
def entropies():
    rng = np.random.default_rng(0)
    common = rng.uniform(0, 1.5, size=(N, 1))
    return (common + rng.uniform(0, 0.8, size=(N, SIDE))).astype(np.float32)


def published(entropies):
    """The published rule, written out."""
    quota, left, found = len(entropies) // (SIDE + 1), list(range(len(entropies))), []
    for i in range(SIDE):
        left.sort(key=lambda j: entropies[j, i])
        found.append(entropies[left[quota], i])
        left = left[quota:]
    return found


def test_equal_quotas_are_the_published_rule(entropies):
    found = by_quotas(entropies, [1 / 5] * 5)
    np.testing.assert_array_equal(found, np.array(published(entropies), np.float32))


@pytest.mark.parametrize(
    "shares", [[0.2] * 5, [0.5, 0.0, 0.25, 0.25, 0.0], [0, 0, 0, 0, 1.0], [1.0, 0, 0, 0, 0]]
)
def test_every_exit_gets_its_share_within_one_image(entropies, shares):
    taken = exits_taken(entropies, by_quotas(entropies, shares))
    counts = np.bincount(taken, minlength=5)
    assert np.all(np.abs(counts[:-1] - np.array(shares[:-1]) * N) <= 1)
    # What rounding leaves goes to the main exit.
    assert abs(counts[-1] - shares[-1] * N) <= SIDE


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.75, 1.0])
def test_mean_macs_come_close_to_their_target_and_never_above(entropies, share):
    taken = exits_taken(entropies, by_macs(entropies, MACS, share))
    mean = np.array(MACS)[taken].mean() / MACS[-1]
    assert share - 0.05 <= mean <= share + 1e-9


def test_a_target_below_the_first_exit_sends_all_images_there(entropies):
    assert not exits_taken(entropies, by_macs(entropies, MACS, 0.05)).any()


@pytest.mark.parametrize("fall", [0.0, 0.02, 0.1])
def test_accuracy_falls_by_at_most_what_is_given(entropies, fall):
    rng = np.random.default_rng(1)
    # Early exits are right about images that they are sure of.
    chances = np.concatenate([1 - 0.35 * entropies, np.full((N, 1), 0.85)], axis=1)
    right = rng.uniform(size=(N, SIDE + 1)) < chances
    thresholds = by_accuracy(entropies, MACS, fall, (entropies, right))
    taken = exits_taken(entropies, thresholds)
    assert right[np.arange(N), taken].mean() >= right[:, -1].mean() - fall - 1e-6
    assert np.array(MACS)[taken].mean() < 0.99 * MACS[-1]


def test_words_of_rules():
    assert parse_rule("quota", 3)[:3] == ("quota", (), "")
    assert parse_rule("quota:0.5,0.3,0.2", 3).values == (0.5, 0.3, 0.2)
    assert parse_rule("accuracy:0.005:pgd20", 3)[1:3] == ((0.005,), "pgd20")
    assert parse_rule("given:0.1,0.2", 3).values == (0.1, 0.2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quotas", "choose one of"),
        ("quota:0.5,0.5", "2 values; quota needs 3, one share for each exit"),
        ("quota:0.5,0.5,0.5", "add up to 1"),
        ("given:0.1", "1 values; given needs 2, one threshold for each side exit"),
        ("given", "0 values"),
        ("macs", "0 values; macs needs 1"),
        ("macs:2", r"\[0, 1\]"),
        ("macs:few", "no list of numbers"),
        ("macs:nan", "finite"),
        ("macs:0.5:pgd20", "choose one of"),
    ],
)
def test_wrong_rules_are_told_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as told:
        parse_rule(text, 3)
    assert "\n" not in str(told.value)
