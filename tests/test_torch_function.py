"""A PyTorch model under JAX's attacks, beside its twin in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from advmoe_jax.attacks import autoattack, linf, pgd
from advmoe_jax.torch_function import from_torch

torch = pytest.importorskip("torch")
IMAGES = np.random.default_rng(0).random((24, 6, 6, 2), np.float32)


@pytest.fixture(scope="module")
def model():
    """Convolution, ReLU, a stride, a linear head."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 3 * 3, 4),
    ).eval()


@pytest.fixture(scope="module")
def twin(model):
    """The same network, written in JAX."""
    kernel, bias, matrix, offset = (jnp.asarray(p.detach().numpy()) for p in model.parameters())

    def function(images):
        x = lax.conv_general_dilated(
            images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC")
        )
        x = jax.nn.relu(x + bias)
        return jnp.transpose(x, (0, 3, 1, 2)).reshape(len(x), -1) @ matrix.T + offset

    return function


def test_values_and_gradients_are_the_twins(model, twin):
    function = from_torch(model)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(24, 4)), jnp.float32)
    for run in (lambda f: f, jax.jit):
        values, pull = jax.vjp(run(function), IMAGES)
        expected, pull_twin = jax.vjp(run(twin), IMAGES)
        np.testing.assert_allclose(values, expected, atol=1e-6)
        np.testing.assert_allclose(pull(weights)[0], pull_twin(weights)[0], atol=1e-6)
    mapped = jax.vmap(function)(IMAGES.reshape(3, 8, 6, 6, 2))
    np.testing.assert_allclose(mapped.reshape(24, 4), expected, atol=1e-6)


def test_autoattack_gives_the_flags_of_the_twin(model, twin):
    labels = np.argmax(twin(IMAGES), axis=1)
    attack = autoattack(linf(0.07), num_steps=5, num_queries=20)
    found, expected = (
        attack(function, IMAGES, labels, jax.random.key(0), progress=False)
        for function in (from_torch(model), twin)
    )
    np.testing.assert_array_equal(found.robust, expected.robust)
    np.testing.assert_array_equal(found.fooled_by, expected.fooled_by)
    assert 0.2 < found.robust_accuracy < 0.8 and len(set(found.fooled_by)) > 1


def test_parameters_are_looked_at_anew(model):
    function = jax.jit(from_torch(model))
    before = function(IMAGES)
    with torch.no_grad():
        model[3].bias += 1
    np.testing.assert_allclose(function(IMAGES), before + 1, atol=1e-6)
    with torch.no_grad():
        model[3].bias -= 1


def test_parameters_without_gradients_and_models_without_parameters(model):
    class Mean(torch.nn.Module):
        def forward(self, images):
            return torch.stack([images.mean((1, 2, 3)), -images.mean((1, 2, 3))], 1)

    function = from_torch(Mean().eval())
    attack = pgd(linf(0.1), num_steps=2, step_size=0.1, start="none")
    found = attack(function, IMAGES, np.zeros(24, np.int32), jax.random.key(0))
    np.testing.assert_allclose(found, np.maximum(IMAGES - 0.1, 0), atol=1e-6)


def test_what_is_no_classifier_of_images_is_refused(model):
    with pytest.raises(ValueError, match="in training mode: call"):
        from_torch(torch.nn.Dropout())
    with pytest.raises(ValueError, match="it must give logits"):
        from_torch(torch.nn.Identity().eval())(IMAGES)
    with pytest.raises(ValueError, match=r"images are float32 \(6, 6, 2\): give float32"):
        from_torch(model)(IMAGES[0])
    with pytest.raises(ValueError, match="images are uint8"):
        from_torch(model)(IMAGES.astype(np.uint8))
