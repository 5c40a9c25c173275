"""What is said and drawn of an explanation, from made-up images."""

import numpy as np
import pytest

from advmoe_jax.evaluation.explanation import Seen, describe
from advmoe_jax.reports import explanation_figures
from advmoe_jax.reports.explanation import CAPTIONS, amplification, load_per_class
from advmoe_jax.reports.table import explanation_facts

NAMES = ("cat", "dog", "owl")


def found_of(seen, num_experts):
    """What the command writes, of made-up images."""
    routing = describe(seen, num_experts, len(NAMES))
    return {
        "attack": {"name": "pgd2", "norm": "linf", "epsilon": 8 / 255},
        "examples": len(seen.labels),
        "class_names": NAMES,
        "routing": routing,
        "router_attack": {"name": "router_kl", **routing} if routing else None,
        "curve": {"epsilon": [0, 0.1], "accuracy": [0.9, 0.2], "attack": {"norm": "linf"}},
    }


def test_every_figure_is_drawn(made_up):
    seen = made_up
    images = np.full((4, 2, 2, 3), 100, np.uint8)
    figures = explanation_figures(found_of(seen, 2), seen, images)
    assert figures.keys() == CAPTIONS.keys()
    assert all(png.startswith(b"\x89PNG") for png in figures.values())
    dense = Seen(*seen[:4])
    assert explanation_figures(found_of(dense, 1), dense, images).keys() == {
        "epsilon.png", "images.png",
    }  # fmt: skip


def test_many_classes_and_experts_fit():
    loads = np.random.default_rng(0).dirichlet(np.ones(16), size=200).tolist()
    names = [f"n{i:08d}" for i in range(200)]
    assert load_per_class({"a": loads, "b": loads}, names)[:4] == b"\x89PNG"


@pytest.mark.parametrize(("largest", "factor"), [(8 / 255, 10), (0.2, 2), (0.5, 1), (0.0, 1)])
def test_the_amplification_is_round_and_stays_in_the_pixel_range(largest, factor):
    assert amplification(largest) == factor


def test_the_gist_in_words(made_up):
    facts = explanation_facts(found_of(made_up, 2))
    assert facts["Attack"] == "pgd2, linf, epsilon 8/255, 4 images"
    assert facts["Load per expert"] == "50.0%, 50.0%"
    assert facts["Accuracy along each pathway, pgd2 images"] == "25.0%, 25.0%"
    assert facts["Accuracy on pgd2 images, clean route"] == "75.0%"
    assert explanation_facts({}) == {"Attack": "attack"}
