"""The suite and the attack on pathways, over any number of images: packed and resumable."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import linf, moe_suite, pathways
from advmoe_jax.files import StateFile
from advmoe_jax.parallel import data_mesh

THREAT = linf(0.05)
KEY = jax.random.key(0)
RUN = pathways(THREAT, num_steps=5, search_steps=5)


def test_both_judges_are_told(leaving):
    """A pathway that errs only where the network leaves it."""
    function, images, labels = leaving
    result = pathways(THREAT, num_steps=10, frozen=True)(
        function, images, labels, KEY, batch_size=3, progress=False
    )
    assert result.robust_accuracy == 0 and result.network_accuracy == 1
    assert set(result.fooled_by) == {"frozen_route"}
    np.testing.assert_array_equal(result.network_robust, True)


def as_arguments(function):
    """The same with an array among its arguments: what is compiled for it serves later calls."""
    classify = jax.tree_util.Partial(lambda z, x: function.classify(x + z), jnp.zeros(()))
    return function._replace(classify=classify)


def test_the_suite_is_the_minimum_over_all(mixtures):
    function, images = as_arguments(mixtures.random()), mixtures.images
    keys = jax.random.split(KEY, 24)
    run = partial(moe_suite(THREAT, num_steps=10, search_steps=10, eot_samples=2), function)
    labels = np.array(jnp.argmax(function(images), axis=1))
    labels[0] = (labels[0] + 1) % 3
    result = run(images, labels, keys, batch_size=8, progress=False)
    assert result.fooled_by[0] == "clean" and result.clean_accuracy == pytest.approx(23 / 24)
    assert 0 < result.robust_accuracy < result.clean_accuracy
    np.testing.assert_array_equal(result.robust, result.fooled_by == "")
    assert np.all(result.network_robust >= result.robust)
    names = ["route", "joint", "straight_through", "softmax_gate", "frozen_route", "worst_pathway"]
    assert list(result.attacks) == names
    left = 23
    for name, report in result.attacks.items():
        assert report.tried == left and report.fooled == np.sum(result.fooled_by == name)
        left -= report.fooled
        assert report.accuracy == pytest.approx(left / 24)
    # By a plain forward pass outside of jit, and by NumPy.
    assert np.abs(result.adversarial - images).max() <= 0.05 * (1 + 1e-5)
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    with jax.disable_jit():
        logits = np.asarray(function(jnp.asarray(result.adversarial)))
    right = np.argmax(logits, axis=1) == labels
    np.testing.assert_array_equal(right, result.network_robust)
    # The same, whatever else is in the batches.
    mixed = np.random.default_rng(0).permutation(24)
    again = run(images[mixed], labels[mixed], keys[mixed], batch_size=8, progress=False)
    np.testing.assert_array_equal(again.fooled_by, result.fooled_by[mixed])


@pytest.mark.slow
def test_batches_of_any_size(mixtures):
    function, images = as_arguments(mixtures.random()), mixtures.images
    run = partial(moe_suite(THREAT, num_steps=10, search_steps=10, eot_samples=2), function)
    labels = np.array(jnp.argmax(function(images), axis=1))
    one, other = (run(images, labels, KEY, batch_size=n, progress=False) for n in (4, 24))
    np.testing.assert_array_equal(one.fooled_by, other.fooled_by)


def test_killed_and_resumed(tmp_path, mixtures, monkeypatch):
    function, images, file = mixtures.random(), mixtures.images, tmp_path / "state.npz"
    function, saves, real = as_arguments(function), [], StateFile.save
    labels = np.asarray(jnp.argmax(function(images), axis=1))
    attack = partial(RUN, function, images, labels, batch_size=4, progress=False)

    def save(self, arrays):
        real(self, arrays)
        saves.append(1)
        if len(saves) == 4:
            raise KeyboardInterrupt

    whole = attack(KEY)
    monkeypatch.setattr(StateFile, "is_due", True)
    monkeypatch.setattr(StateFile, "save", save)
    with pytest.raises(KeyboardInterrupt):
        attack(KEY, state_file=file)
    resumed = attack(KEY, state_file=file)
    assert len(saves) == 4 + 2 + 1  # six batches, and the end
    np.testing.assert_array_equal(resumed.fooled_by, whole.fooled_by)
    np.testing.assert_array_equal(resumed.adversarial, whole.adversarial)
    again = attack(KEY, state_file=file)
    assert again.robust_accuracy == whole.robust_accuracy and again.attacks == resumed.attacks
    assert resumed.attacks["worst_pathway"].calls == whole.attacks["worst_pathway"].calls == 6
    with pytest.raises(ValueError, match="of another evaluation"):
        attack(jax.random.key(1), state_file=file)


@pytest.mark.slow
def test_a_closure_is_traced_anew_at_every_call(mixtures):
    router = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)
    says = {1: mixtures.constant(2, 0)}  # what expert 1 says; both say 0 at first
    experts = [says[1], lambda x: says[1](x)]
    function = mixtures.of(lambda flat: 9 * (flat @ router), experts)
    images = mixtures.images[function.classify(mixtures.images).indices[:, 0, 0] == 0]
    run = partial(pathways(THREAT, num_steps=2, search_steps=10), progress=False, batch_size=24)
    labels = np.zeros(len(images), int)
    assert run(function, images, labels, KEY).robust.all()
    says[1] = mixtures.constant(0, 2)
    assert 0 < run(function, images, labels, KEY).robust_accuracy < 1


def test_wrong_batch_size(leaving):
    words = "batch_size=3 must be a positive multiple of 2"
    with pytest.raises(ValueError, match=words):
        RUN(*leaving, KEY, batch_size=3, mesh=data_mesh(2))


def test_of_the_attacks_that_the_network_judges_each_one_may_be_told(mixtures):
    function, images = as_arguments(mixtures.random()), mixtures.images[:8]
    labels = np.array(jnp.argmax(function(images), axis=1))
    run = moe_suite(THREAT, num_steps=2, search_steps=2, eot_samples=1)
    result = run(function, images, labels, KEY, individual=True, batch_size=8, progress=False)
    alone = {name: report.alone for name, report in result.attacks.items()}
    assert alone.pop("frozen_route") is alone.pop("worst_pathway") is None
    assert len(alone) == 4 and all(0 <= value <= 1 for value in alone.values())
