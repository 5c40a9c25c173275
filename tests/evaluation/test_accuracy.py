"""The evaluator against a plain loop, whatever the batch size and the number of devices."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from advmoe_jax.attacks import linf
from advmoe_jax.data import pipeline
from advmoe_jax.data.decoding import Encoded
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Streamed
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import accuracy
from advmoe_jax.evaluation.accuracy import (
    Outcome,
    agreement,
    create_evaluator,
    routing_summary,
)
from advmoe_jax.evaluation.named_attacks import ATTACKS, named_attack
from advmoe_jax.evaluation.records import Protocol, Record
from advmoe_jax.files import StateFile
from advmoe_jax.models import ViT
from advmoe_jax.models.registry import create
from advmoe_jax.parallel import data_mesh, distribute, replicate, state_specs

EXAMPLES = 29  # no multiple of any batch size below, nor of the devices
PROTOCOL = Protocol(linf(0.1), 0.05)


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    # Dark and bright ones, which the router tells apart.
    images = rng.integers(64, size=(EXAMPLES, 8, 8, 1)) + rng.integers(
        192, size=(EXAMPLES, 1, 1, 1)
    )
    return Split(images.astype(np.uint8), rng.integers(4, size=EXAMPLES).astype(np.int32))


@pytest.fixture(scope="module")
def moe(tiny):
    return tiny(num_experts=3)


def evaluated(model, split, name="pgd2", *, devices, batch_size, **settings):
    network, params, stats = model
    mesh = data_mesh(devices)
    evaluator = create_evaluator(
        network, named_attack(name, PROTOCOL, network.parts), mesh, batch_size
    )
    params, stats = replicate((params, stats), mesh)
    data = pipeline.put(split, mesh)
    return evaluator(params, stats, data, jax.random.key(3), **settings)


@pytest.fixture(scope="module")
def plain(moe, split):
    """(correct, predictions, choices, entropy), of one image after the other."""
    network, params, stats = moe
    attack = named_attack("pgd2", PROTOCOL, network.parts)

    @jax.jit
    def answer(image, label, key):
        x = attack.perturb(network, params, stats, image[None], label[None], key[None])
        output = network.apply(params, stats, x)[0]
        return output.logits[0], output.routing.scores[0, 0]

    found = []
    for i, (image, label) in enumerate(zip(*split, strict=True)):
        key = jax.random.fold_in(jax.random.key(3), i)
        logits, scores = answer(jnp.asarray(image, jnp.float32) / 255, label, key)
        prediction, scores = int(np.argmax(logits)), np.asarray(scores, float)
        probabilities = np.exp(scores) / np.sum(np.exp(scores))
        entropy = -np.sum(probabilities * np.log(probabilities))
        found.append((prediction == label, prediction, np.argmax(scores), entropy))
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 12), (1, 29), (8, 16), (8, 3)])
def test_as_a_plain_loop_whatever_the_batch_size_and_the_devices(
    moe, split, plain, devices, batch_size
):
    correct, predictions, choices, entropy = plain
    assert 0 < correct.sum() < EXAMPLES and len(np.unique(choices)) > 1
    outcome = evaluated(moe, split, devices=devices, batch_size=batch_size)
    np.testing.assert_array_equal(outcome.correct, correct)
    np.testing.assert_array_equal(outcome.predictions, predictions)
    np.testing.assert_array_equal(outcome.choices, choices[:, None, None])
    np.testing.assert_allclose(outcome.entropy, entropy[:, None], rtol=1e-5)
    assert outcome.accuracy == pytest.approx(correct.mean()) and outcome.seconds > 0


def test_spread_experts_answer_as_whole_ones(split):
    size = {"patch": 4, "layers": 1, "width": 8, "hidden": 12, "heads": 2, "placement": "0"}
    vit = ViT("vit_tiny_8", num_experts=4, top_k=2, **size)
    network, *weights = create(vit, (8, 8, 1), 4, jax.random.key(0))
    weights = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(1), x.shape), weights)
    found = []
    for shards in (1, 2):
        mesh = data_mesh(4, shards)
        attack = named_attack("pgd2", PROTOCOL, network.parts)
        evaluator = create_evaluator(network, attack, mesh, 12)
        spread = distribute(weights, state_specs(weights, network.expert_parameters, mesh), mesh)
        found.append(evaluator(*spread, pipeline.put(split, mesh), jax.random.key(3)))
    assert found[0].correct.sum() > 0 and len(np.unique(found[0].choices)) > 2
    for name in ("correct", "predictions", "choices"):
        np.testing.assert_array_equal(*(getattr(outcome, name) for outcome in found))


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 12), (8, 16)])
def test_streamed_images_are_answered_as_those_on_the_devices(moe, split, devices, batch_size):
    items = []
    for label, image in zip(split.labels, split.images[..., 0], strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        items.append(Encoded("one", int(label), file.getvalue()))
    streamed = Split(EncodedImages(items, (8, 8, 1), 0), split.labels)
    assert isinstance(pipeline.put(streamed, data_mesh(devices)), Streamed)
    settings = {"devices": devices, "batch_size": batch_size, "keep_images": True, "warm_up": True}
    found, expected = (evaluated(moe, images, **settings) for images in (streamed, split))
    for name in ("correct", "predictions", "choices", "entropy", "images"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_several_choices_stand_best_first(tiny, split):
    network, params, stats = model = tiny(num_experts=3, top_k=2, gate="softmax")
    outcome = evaluated(model, split, "clean", devices=1, batch_size=16)
    images = jnp.asarray(split.images, jnp.float32) / 255
    scores = network.route(params, stats, images)[0].scores
    np.testing.assert_array_equal(outcome.choices, np.argsort(-np.asarray(scores))[..., :2])


def test_the_key_matters(moe, split):
    """Else the tests above would not notice keys that follow the batch instead of the image."""
    network, params, stats = moe
    attack = named_attack("pgd2", PROTOCOL, network.parts)
    images = jnp.asarray(split.images, jnp.float32) / 255
    perturb = jax.jit(
        lambda keys: attack.perturb(network, params, stats, images, split.labels, keys)
    )
    one, other = (perturb(jax.random.split(jax.random.key(i), EXAMPLES)) for i in (0, 1))
    assert np.any(one != other)


def test_what_is_no_number_is_never_right(tiny, split):
    network, params, stats = tiny(num_experts=1)
    broken = network, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params), stats
    labels = np.zeros(EXAMPLES, np.int32)  # what argmax says of NaN
    found = evaluated(broken, split._replace(labels=labels), "clean", devices=1, batch_size=10)
    assert found.accuracy == 0
    np.testing.assert_array_equal(found.predictions, -1)


def test_a_dense_network_has_no_routing(tiny, split):
    outcome = evaluated(tiny(num_experts=1), split, "clean", devices=1, batch_size=16)
    assert outcome.choices is None and outcome.entropy is None
    assert outcome.correct.shape == outcome.predictions.shape == (EXAMPLES,)


def test_progress_counts_every_image_once_and_warming_up_not(moe, split):
    seen = []
    settings = {"devices": 1, "batch_size": 12}
    outcome = evaluated(moe, split, "clean", warm_up=True, advance=seen.append, **settings)
    assert seen == [12, 12, 5]
    np.testing.assert_array_equal(
        outcome.predictions, evaluated(moe, split, "clean", **settings).predictions
    )


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_time_to_compile_is_not_counted_after_warming_up(monkeypatch, warm_up):
    """By a clock that batches move: the first call of a program takes 100 s, the others 1 s."""
    clock = [0.0]

    def run(indices, clean):
        clock[0] += 1 if clock[0] else 100
        return {"predictions": indices, "correct": indices == 0, "outside": indices < 0}

    monkeypatch.setattr(accuracy.time, "perf_counter", lambda: clock[0])
    batches = [(np.arange(2), 2), (np.arange(2), 1)]
    found = accuracy._collect(run, iter, batches, None, StateFile(None, ""), warm_up)
    assert found.seconds == (2 if warm_up else 101)
    np.testing.assert_array_equal(found.predictions, [0, 1, 0])


def test_told_to_stop_it_saves_first(tmp_path):
    batches = [(np.arange(2) + i, 2) for i in (0, 2, 4)]
    ran = []

    def run(indices, images):
        ran.append(images[0])
        return {"predictions": indices, "correct": indices == 0, "outside": indices < 0}

    def stop(images):
        if len(ran) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        accuracy._collect(run, iter, batches, stop, StateFile(tmp_path / "state.npz", ""))
    reader = StateFile(tmp_path / "state.npz", "", writes=False)
    found = accuracy._collect(run, iter, batches, None, reader)
    assert ran == [0, 2, 4]
    np.testing.assert_array_equal(found.predictions, np.arange(6))
    assert int(reader.load()["batches"]) == 2  # another process writes


def test_images_that_left_the_ball_count_as_not_attacked(moe, split, monkeypatch):
    """Images of odd numbers are moved too far, or are not numbers at all."""
    network, params, stats = moe
    odd = np.arange(EXAMPLES) % 2 == 1

    def perturb(function, images, labels, keys):
        number = jnp.arange(len(images)) % 4
        far = jnp.where(number == 1, 0.2, jnp.where(number == 3, jnp.nan, 0.05))
        return jnp.abs(images - far[:, None, None, None])

    mesh = data_mesh(1)
    monkeypatch.setitem(ATTACKS, "broken", Record(lambda a: perturb, lambda a: {}))
    attack = named_attack("broken", PROTOCOL, network.parts)
    evaluator = create_evaluator(network, attack, mesh, EXAMPLES)
    params, stats = replicate((params, stats), mesh)
    data = pipeline.put(split, mesh)
    outcome = evaluator(params, stats, data, jax.random.key(0), keep_images=True)
    np.testing.assert_array_equal(outcome.outside, odd)
    clean = evaluated(moe, split, "clean", devices=1, batch_size=EXAMPLES)
    np.testing.assert_array_equal(outcome.predictions[odd], clean.predictions[odd])
    assert not clean.outside.any()
    pixels = np.float32(split.images) / 255
    np.testing.assert_allclose(outcome.images[odd], pixels[odd], atol=1e-6)
    np.testing.assert_allclose(outcome.images[~odd], np.abs(pixels - 0.05)[~odd], atol=1e-6)


@pytest.mark.parametrize("batch_size", [0, -4])
def test_a_batch_size_that_cannot_be(moe, batch_size):
    attack = named_attack("clean", PROTOCOL, moe[0].parts)
    with pytest.raises(UserError, match=f"evaluation.batch_size={batch_size} must be at least 1"):
        create_evaluator(moe[0], attack, data_mesh(1), batch_size)


def outcome(choices, entropy=None):
    if choices is not None:
        choices = np.array(choices, np.int32)
        entropy = np.zeros(choices.shape[:2]) if entropy is None else np.array(entropy)
    return Outcome(np.array([True]), np.array([0]), choices, entropy, 1.0)


def test_load_and_entropy():
    summary = routing_summary(
        outcome([[[0]], [[2]], [[2]], [[2]]], [[0.0], [0.5], [0.5], [1.0]]), 4
    )
    assert summary == {"load": [0.25, 0.0, 0.75, 0.0], "entropy": 0.5}


def test_load_of_several_choices_counts_each():
    summary = routing_summary(outcome([[[0, 1]], [[1, 2]]]), 3)
    assert summary["load"] == [0.25, 0.5, 0.25]


def test_agreement_is_of_first_choices():
    clean, attacked = (
        outcome([[[0, 1]], [[1, 2]], [[2, 0]], [[0, 1]]]),
        outcome([[[0, 2]], [[2, 1]], [[2, 0]], [[1, 0]]]),
    )
    assert agreement(clean, attacked) == 0.5
    assert agreement(clean, clean) == 1.0


def test_layers_that_are_routed_by_themselves():
    clean, attacked = (
        outcome([[[0], [1]], [[1], [1]], [[0], [1]], [[1], [1]]], [[0.0, 0.5]] * 4),
        outcome([[[0], [1]], [[1], [0]], [[0], [1]], [[1], [0]]], [[0.0, 0.5]] * 4),
    )
    summary = routing_summary(clean, 2)
    assert summary["load"] == [0.25, 0.75] and summary["entropy"] == 0.25
    assert summary["layers"] == {"load": [[0.5, 0.5], [0.0, 1.0]], "entropy": [0.0, 0.5]}
    assert agreement(clean, attacked) == 0.75


def test_without_a_router_there_is_none():
    dense = outcome(None)
    assert routing_summary(dense, 1) is None
    assert agreement(dense, dense) is None
