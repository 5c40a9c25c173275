"""Losses against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks.losses import (
    LOSSES,
    cross_entropy,
    dlr,
    dlr_targeted,
    kl,
    make_loss,
    margin,
    margin_targeted,
    targeted,
)

RNG = np.random.default_rng(0)
LOGITS = (5 * RNG.normal(size=(6, 5))).astype(np.float32)
OTHER = (5 * RNG.normal(size=(6, 5))).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 4, int(LOGITS[5].argmax())])


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_cross_entropy():
    expected = -log_softmax(LOGITS)[np.arange(6), LABELS]
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), expected, rtol=1e-5)


def test_cross_entropy_with_distributions_for_labels():
    soft = RNG.dirichlet(np.ones(5), size=6).astype(np.float32)
    expected = -(soft * log_softmax(LOGITS)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(LOGITS, soft), expected, rtol=1e-5)
    layers = np.stack([LOGITS, OTHER], axis=1)  # two decisions per image
    expected = expected - (soft * log_softmax(OTHER)).sum(axis=1)
    np.testing.assert_allclose(cross_entropy(layers, soft), expected, rtol=1e-5)
    fooled = LOSSES["cross_entropy"].fooled(LOGITS, soft)
    np.testing.assert_array_equal(fooled, LOGITS.argmax(axis=1) != soft.argmax(axis=1))


def test_margin():
    expected = [
        max(row[j] for j in range(5) if j != y) - row[y]
        for row, y in zip(LOGITS, LABELS, strict=True)
    ]
    np.testing.assert_allclose(margin(LOGITS, LABELS), expected, rtol=1e-6)
    assert margin(LOGITS, LABELS)[5] < 0


def test_dlr():
    ordered = -np.sort(-LOGITS.astype(np.float64), axis=1)
    expected = np.asarray(margin(LOGITS, LABELS)) / (ordered[:, 0] - ordered[:, 2])
    np.testing.assert_allclose(dlr(LOGITS, LABELS), expected, rtol=1e-5)
    # It does not hang on the scale or the shift of the logits.
    np.testing.assert_allclose(dlr(7 * LOGITS + 3, LABELS), expected, rtol=1e-4)


def test_kl():
    log_q, log_p = log_softmax(LOGITS), log_softmax(OTHER)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    divergence = kl(jnp.array(LOGITS), jnp.array(OTHER))
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)
    assert divergence.min() > 0


def test_kl_is_zero_at_equality():
    np.testing.assert_array_equal(kl(jnp.array(LOGITS), jnp.array(LOGITS)), 0)
    np.testing.assert_allclose(kl(jnp.array(LOGITS), jnp.array(LOGITS + 10)), 0, atol=1e-5)


def test_kl_of_certain_outputs_is_finite():
    certain = jnp.array([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(kl(x, certain)))(certain[::-1])
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_kl_of_a_tree_is_the_sum():
    outputs = {"logits": jnp.array(LOGITS), "scores": jnp.array(LOGITS[:, :2])}
    clean = {"logits": jnp.array(OTHER), "scores": jnp.array(OTHER[:, :2])}
    parts = sum(kl(outputs[name], clean[name]) for name in outputs)
    np.testing.assert_allclose(kl(outputs, clean), parts, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_float32_whatever_the_logits(name):
    loss = make_loss(name)
    logits = jnp.array(LOGITS, jnp.bfloat16)
    target = logits if loss.against_clean else LABELS
    value, fooled = loss.value(logits, target), loss.fooled(logits, target)
    assert value.shape == fooled.shape == (6,)
    assert value.dtype == jnp.float32 and fooled.dtype == bool


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr"])
def test_fooled_is_misclassified(name):
    fooled = make_loss(name).fooled(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_array_equal(fooled, LOGITS.argmax(axis=1) != LABELS)
    assert not fooled[5]


def test_kl_has_fooled_when_any_decision_moved():
    same, moved = jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 2.0]])
    fooled = make_loss("kl").fooled
    assert not fooled((same, same), (3 * same, same))[0]
    assert fooled((same, moved), (same, same))[0]
    assert fooled((moved, same), (same, same))[0]


@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_a_positive_margin_is_an_error(name):
    value = make_loss(name).value(jnp.array(LOGITS), jnp.array(LABELS))
    np.testing.assert_array_equal(value > 0, LOGITS.argmax(axis=1) != LABELS)


def test_unknown_loss():
    with pytest.raises(ValueError, match="'hinge' is unknown; choose one of cross_entropy, margin"):
        make_loss("hinge")


def test_targeted_margin():
    wanted = (LABELS + 1) % 5
    expected = LOGITS[np.arange(6), wanted] - LOGITS[np.arange(6), LABELS]
    np.testing.assert_allclose(margin_targeted(LOGITS, (LABELS, wanted)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cross_entropy((LOGITS, {}), LABELS), r"returns a tuple: .* lambda x: function"),
        (lambda: margin({"logits": LOGITS}, LABELS), "returns a dict"),
        (lambda: cross_entropy(LOGITS[:, 0], LABELS), r"returns \(6,\): it must return logits"),
        (lambda: margin(LOGITS[:, :1], LABELS * 0), "'margin' needs 2 classes, the function has 1"),
        (lambda: dlr(LOGITS[:, :2], LABELS * 0), "'dlr' needs 3 classes, the function has 2"),
        (lambda: dlr_targeted(LOGITS[:, :3], (LABELS * 0, LABELS * 0)), "needs 4 classes"),
        (lambda: cross_entropy(LOGITS, LABELS + 1), "labels reach from 1 to 5, but .* 0 to 4"),
        (lambda: margin(LOGITS, LABELS - 1), "labels reach from -1 to 3"),
    ],
)
def test_what_is_no_logits(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_labels_that_are_traced_are_not_looked_at():
    np.testing.assert_allclose(jax.jit(margin)(LOGITS, LABELS), margin(LOGITS, LABELS), rtol=1e-6)


def test_a_target_is_reached_where_every_decision_is():
    logits = jnp.asarray([[[0.0, 1], [1, 0]], [[0, 1], [0, 1]]])  # two images, two decisions
    loss = targeted(make_loss("cross_entropy"))
    np.testing.assert_array_equal(loss.fooled(logits, jnp.asarray([1, 1])), [False, True])
