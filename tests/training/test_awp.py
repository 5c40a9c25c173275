"""The size and direction of adversarial weight perturbations."""

import jax.numpy as jnp
import numpy as np

from advmoe_jax.training.awp import perturbation

GAMMA = 0.01


def test_every_layer_moves_along_its_gradient_by_a_share_of_its_norm():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 4, 5), "head": (4, 6), "bias": (2, 6), "scale": (5,)}
    shapes |= {"cls": (1, 1, 8), "positions": (1, 5, 8)}
    params, gradients = (
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    moved = perturbation(params, gradients, GAMMA, dict.fromkeys(shapes, False))
    for name in ("kernel", "head"):
        direction = gradients[name] / np.linalg.norm(gradients[name])
        expected = GAMMA * np.linalg.norm(params[name]) * direction
        np.testing.assert_allclose(moved[name], expected, rtol=1e-5, atol=1e-8)
    for name in ("bias", "scale", "cls", "positions"):
        assert not moved[name].any()


def test_every_expert_has_a_ball_of_its_own():
    rng = np.random.default_rng(0)
    kernel, gradient = rng.normal(size=(2, 3, 3, 3, 2, 2)).astype(np.float32)
    kernel[1] *= 10
    gradient[2] = 0  # no image reached it
    moved = np.asarray(perturbation({"k": kernel}, {"k": gradient}, GAMMA, {"k": True})["k"])
    norms = np.linalg.norm(moved.reshape(3, -1), axis=1)
    of_kernels = np.linalg.norm(kernel.reshape(3, -1), axis=1)
    np.testing.assert_allclose(norms, GAMMA * of_kernels * [1, 1, 0], rtol=1e-5)


def test_the_dtype_stays():
    ones = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    moved = perturbation(ones, ones, 0.5, {"w": False})["w"]
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved, 0.5 * np.ones((2, 2)))
