"""What TensorBoard shows besides curves: of which images, when, and what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.data.sources import Split
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.showing import create_showing

LABELS = np.arange(12, dtype=np.int32) % 4


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8)
    split = Split(pixels, LABELS)
    return Images("made up", split, split, split, ("a", "b", "c", "d"))


def test_router_scores_and_attacked_images(config, tiny, images):
    config.evaluation.show_every, config.evaluation.validation_steps = 2, 1
    network, params, stats = tiny(2)
    show = create_showing(config, network, images)
    assert show(params, stats, 0) is None and show(params, stats, 2) is None
    shown = show(params, stats, 1)
    clean = jnp.asarray(images.validation.images) / 255
    scores = network.route(params, stats, clean)[0].scores
    names = [f"router_scores/{x}/expert_{e}" for x in ("clean", "attacked") for e in (0, 1)]
    assert sorted(shown.histograms) == sorted(names)
    for expert in (0, 1):
        found = shown.histograms[f"router_scores/clean/expert_{expert}"]
        np.testing.assert_allclose(found, scores[:, 0, expert], atol=1e-5)
        attacked = shown.histograms[f"router_scores/attacked/expert_{expert}"]
        assert attacked.shape == found.shape and np.any(attacked != found)
    picture = shown.pictures["attacked_images"]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and len(np.unique(picture)) > 20


def test_a_dense_network_has_no_scores(config, tiny, images):
    config.evaluation.show_every, config.evaluation.validation_steps = 1, 1
    network, params, stats = tiny(1)
    shown = create_showing(config, network, images)(params, stats, 0)
    assert shown.histograms == {} and list(shown.pictures) == ["attacked_images"]


def test_by_default_nothing_is_shown(config, tiny, images):
    network, params, stats = tiny(1)
    show = create_showing(config, network, images)
    assert [show(params, stats, epoch) for epoch in range(20)] == [None] * 20
    assert jax.tree.leaves(params)  # they were only looked at
