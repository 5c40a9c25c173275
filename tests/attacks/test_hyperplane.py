"""The smallest step to a hyperplane inside the pixel range, against a solver."""

import jax
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from advmoe_jax.attacks.hyperplane import step_to_hyperplane

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(-0.2, 1.2, (12, 7)).clip(0, 1).astype(np.float32)
NORMALS = RNG.normal(size=(12, 7)).astype(np.float32)
NORMALS[3, 2] = 0
GAPS = RNG.normal(size=12).astype(np.float32)
step = jax.jit(step_to_hyperplane, static_argnums=0)


def reachable():
    """The gap, or what the range leaves of it."""
    sign = np.sign(GAPS)[:, None]
    room = np.where(sign * NORMALS > 0, 1 - POINTS, POINTS)
    return sign[:, 0] * np.minimum(np.abs(GAPS), np.sum(np.abs(NORMALS) * room, axis=1))


def smallest(norm, point, normal, gap):
    """The norm of the smallest step, by SciPy."""
    bounds = list(zip(-point, 1 - point, strict=True))
    if norm == "l2":
        feasible = linprog(np.zeros(7), A_eq=normal[None], b_eq=[gap], bounds=bounds).x
        equal = {"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal}
        found = minimize(
            lambda d: d @ d,
            feasible,
            jac=lambda d: 2 * d,
            bounds=bounds,
            constraints=[equal],
            options={"ftol": 1e-14},
        )
        return np.sqrt(found.fun)
    # Linear programs in (step, bound of its magnitudes).
    eye, number = np.eye(7), 1 if norm == "linf" else 7
    cap = np.ones((7, 1)) if norm == "linf" else eye
    found = linprog(
        np.concatenate([np.zeros(7), np.ones(number)]),
        A_ub=np.block([[eye, -cap], [-eye, -cap]]),
        b_ub=np.zeros(14),
        A_eq=np.concatenate([normal, np.zeros(number)])[None],
        b_eq=[gap],
        bounds=bounds + [(0, None)] * number,
    )
    return found.fun


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_against_a_solver(norm):
    steps = np.asarray(step(norm, POINTS, NORMALS, GAPS, 0.0, 1.0), np.float64)
    gaps = reachable()
    assert np.sum(np.abs(gaps) < np.abs(GAPS) - 1e-3) >= 1  # some cannot be reached
    np.testing.assert_allclose(np.sum(steps * NORMALS, axis=1), gaps, atol=1e-5)
    assert (POINTS + steps).min() >= -1e-6 and (POINTS + steps).max() <= 1 + 1e-6
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    for i in np.flatnonzero(np.abs(gaps - GAPS) < 1e-6):
        expected = smallest(norm, *(a[i].astype(np.float64) for a in (POINTS, NORMALS, GAPS)))
        np.testing.assert_allclose(np.linalg.norm(steps[i], order), expected, atol=2e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-20, 1e10])
def test_whatever_the_scale_of_the_gradient(norm, scale):
    steps = step(norm, POINTS, NORMALS, GAPS, 0.0, 1.0)
    scaled = step(norm, POINTS, np.float32(scale) * NORMALS, np.float32(scale) * GAPS, 0.0, 1.0)
    np.testing.assert_allclose(scaled, steps, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_direction_no_step(norm):
    assert not np.any(step(norm, POINTS, 0 * NORMALS, GAPS, 0.0, 1.0))
    assert not np.any(step(norm, POINTS, NORMALS, 0 * GAPS, 0.0, 1.0))
