"""Which images are shown for which exit, and what is said of them."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from advmoe_jax.evaluation.accuracy import Outcome
from advmoe_jax.reports import exit_examples


def outcome(exits, entropies=None, correct=None):
    count = len(exits)
    return Outcome(
        np.ones(count, bool) if correct is None else np.asarray(correct),
        np.arange(count) % 3,
        *(None, None, 0.0),
        exits=np.asarray(exits),
        entropies=np.zeros((count, 2)) if entropies is None else np.asarray(entropies),
    )


@pytest.fixture
def drawn(monkeypatch):
    """Draws on a figure that can be looked into: titles of the images, by the exit's row."""

    def draw(*args):
        figure = Figure()
        monkeypatch.setattr(exit_examples, "png_of", lambda paint, size: paint(figure))
        exit_examples.examples_by_exit(*args)
        rows = np.array(figure.axes).reshape(-1, 10)
        shown = [[axes for axes in row if axes.images] for row in rows]
        return shown, [row[0].texts[0].get_text() for row in rows]

    return draw


def test_images_stand_in_the_row_of_their_exit_the_surest_first(drawn):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    entropies = [[0.3, 9], [0.1, 9], [5, 0.2], [5, 7], [5, 6]]
    clean = outcome([0, 0, 1, 2, 2], entropies, [True, True, True, False, True])
    shown, words = drawn(clean, images, ["a", "b", "c"], {})
    numbers = [[int(axes.images[0].get_array()[0, 0]) for axes in row] for row in shown]
    assert numbers == [[1, 0], [2], [4, 3]]
    assert [[axes.get_title() for axes in row] for row in shown] == [["b", "a"], ["c"], ["b", "a"]]
    assert words == ["exit 1\n2 of 5\n100.0% right", "exit 2\n1 of 5\n100.0% right",
                     "main\n2 of 5\n50.0% right"]  # fmt: skip
    assert shown[2][1].title.get_color() != shown[2][0].title.get_color() == "black"


def test_an_arrow_tells_who_leaves_elsewhere_under_the_attack(drawn):
    images = np.zeros((3, 2, 2, 3), np.uint8)
    moved = {"average": outcome([2, 1, 1]), "main": outcome([0, 0, 0])}
    shown, words = drawn(outcome([0, 1, 0]), images, ["a", "b", "c"], moved)
    titles = [[axes.get_title() for axes in row] for row in shown]
    assert titles == [["a → main", "c → exit 2"], ["b"], []]
    assert words[2] == "main\n0 of 3"


def test_of_many_images_ten_are_shown_from_first_to_last(drawn):
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    entropies = np.stack([np.arange(100), np.zeros(100)], axis=-1)
    shown, _ = drawn(outcome([0] * 100, entropies), images, ["a", "b", "c"], {})
    numbers = [int(axes.images[0].get_array()[0, 0]) for axes in shown[0]]
    assert numbers == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
