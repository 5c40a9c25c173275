"""Slopes, spectral norms and jumps, of functions whose constants are known."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import l1, l2, linf
from advmoe_jax.evaluation import lipschitz
from advmoe_jax.models import ViT, functional
from advmoe_jax.routing.choice import Routing

SIZE = {"layers": 1, "width": 8, "hidden": 12, "heads": 2, "patch": 4}
LABELS = jnp.array([0, 1, 2, 0])


def images_of(batch=4, seed=1):
    return jax.random.uniform(jax.random.key(seed), (batch, 8, 8, 1))


@pytest.fixture(scope="module")
def moe():
    # Behind the last block a class token alone is looked at: with it, most routes are no matter.
    more = {"placement": "0", "pool": "mean", "dispatch": "every"}
    settings = ViT("vit_tiny_8", num_experts=3, **more, **SIZE)
    network, params, stats = functional(
        settings.create(in_channels=1, num_classes=3, rngs=nnx.Rngs(0))
    )
    keys = iter(jax.random.split(jax.random.key(7), 1000))
    moved = jax.tree.map(
        lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape, p.dtype), params
    )
    return network, moved, stats


@pytest.mark.parametrize(("threat", "order"), [(linf(0.1), 1), (l2(0.5), 2)])
def test_a_linear_functions_slope_is_its_weights_norm_everywhere(threat, order):
    weights = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)

    def function(x):
        return x.reshape(len(x), -1) @ weights

    images = images_of()
    logits = np.asarray(function(images))
    rest = np.where(np.eye(3, dtype=bool)[LABELS], -np.inf, logits).argmax(axis=1)
    expected = np.linalg.norm(weights[:, LABELS] - weights[:, rest], ord=order, axis=0)
    found = lipschitz.slopes(function, threat, images, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # No two points are further apart in the margin.
    others = images_of(seed=2)
    observed = lipschitz.observed_slopes(function, threat, images, others, LABELS)
    largest = max(
        np.linalg.norm(weights[:, a] - weights[:, b], ord=order) for a in range(3) for b in range(3)
    )
    assert 0 < observed.max() <= largest
    np.testing.assert_array_equal(
        lipschitz.observed_slopes(function, threat, images, images, LABELS), 0
    )


def test_ascent_finds_steeper_points_than_the_images():
    def function(x):  # the slope of logit 0 grows with the sum
        total = jnp.sum(x, axis=(1, 2, 3))
        return jnp.stack([total**2, jnp.zeros_like(total)], axis=1)

    images, threat, labels = 0.5 * images_of(), linf(0.1), jnp.zeros(4, jnp.int32)
    total = np.sum(np.asarray(images), axis=(1, 2, 3))
    at = lipschitz.slopes(function, threat, images, labels)
    np.testing.assert_allclose(at, 2 * total * 64, rtol=1e-5)
    found = lipschitz.largest_slopes(function, threat, images, labels)
    np.testing.assert_allclose(found, 2 * (total + 6.4) * 64, rtol=1e-4)


def test_norms_without_a_dual_are_refused():
    with pytest.raises(ValueError, match="linf or l2, not in l1"):
        lipschitz.slopes(lambda x: x.reshape(len(x), -1), l1(1.0), images_of(), LABELS)


def test_spectral_norms_are_singular_values():
    for shape in ((5, 12, 7), (2, 128, 512)):
        matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        expected = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)[:, 0]
        np.testing.assert_allclose(lipschitz.spectral_norm(matrices), expected, rtol=1e-5)


def test_no_mlp_is_steeper_than_its_bound(moe):
    _, params, _ = moe
    bounds = lipschitz.mlp_bounds(params)
    assert bounds.keys() == {"block0"} and len(bounds["block0"]) == 3
    mlp = params["experts"]["block0"]["mlp"]

    def expert(number, x):
        first, second = ({k: v[number] for k, v in mlp[name].items()} for name in mlp)
        hidden = jax.nn.gelu(x @ first["kernel"] + first["bias"])
        return hidden @ second["kernel"] + second["bias"]

    points = 3 * jax.random.normal(jax.random.key(0), (200, 8))
    for number in range(3):
        jacobians = jax.vmap(jax.jacobian(lambda x, number=number: expert(number, x)))(points)
        steepest = np.linalg.norm(np.asarray(jacobians), ord=2, axis=(1, 2)).max()
        assert 0.2 * bounds["block0"][number] < steepest <= bounds["block0"][number]
    slope = jax.vmap(jax.grad(jax.nn.gelu))(jnp.linspace(-5, 5, 10001))
    assert pytest.approx(float(slope.max()), abs=1e-4) == lipschitz.GELU_SLOPE


def test_a_jump_is_the_difference_of_two_routes_at_one_point(moe):
    network, params, stats = moe
    images, others = images_of(6), images_of(6, seed=3)
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    found = lipschitz.jumps(network, params, stats, images, others, labels, threat=linf(0.1))
    route = network.route(params, stats, images)[0].indices
    end = network.route(params, stats, others)[0].indices
    np.testing.assert_array_equal(found.found, jnp.any(route != end, axis=(1, 2)))
    there = np.asarray(found.found)
    assert 2 < there.sum() < len(there)
    assert found.step[there].min() > 0 and found.step.max() < 1e-5
    assert found.logits[there].min() > 1e-3  # the experts differ, and hence the answers
    np.testing.assert_array_equal(found.logits[~there], 0)
    # The margin's jump is no more than sqrt(2) times that of all logits.
    assert np.all(found.margin <= np.sqrt(2) * found.logits + 1e-5)
    # Experts that are all alike leave no jump.
    alike = jax.tree.map(
        lambda p, stacked: jnp.broadcast_to(p[:1], p.shape) if stacked else p,
        params["experts"],
        network.stacked["experts"],
    )
    same = lipschitz.jumps(
        network, params | {"experts": alike}, stats, images, others, labels, threat=linf(0.1)
    )
    # But for the gate, which weighs the leaving expert and the arriving one by equal scores.
    assert same.logits.max() < 1e-3


def test_all_is_measured_of_a_mixture(moe):
    network, params, stats = moe
    images, adversarial = images_of(), jnp.clip(images_of() + 0.05, 0, 1)
    found = lipschitz.measured(network, params, stats, images, adversarial, LABELS, linf(0.1))
    assert found.keys() == {
        "slope", "slope_in_ball", "observed", "observed_along_clean_routes", "mlp_bounds", "jumps"
    }  # fmt: skip
    assert found["slope_in_ball"]["largest"] >= found["slope"]["largest"]
    route = Routing(network.route(params, stats, images)[0].indices)

    def held(x):
        return network.apply(params, stats, x, routing=route)[0].logits

    observed = lipschitz.observed_slopes(held, linf(0.1), images, adversarial, LABELS)
    assert found["observed_along_clean_routes"]["largest"] == pytest.approx(
        float(observed.max()), rel=1e-4
    )
