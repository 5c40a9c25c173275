"""How fast a network's answer changes with the image, measured: bounds from below and from above.

The function that is measured is the margin, the right logit minus the largest other one, whose sign
is what an attack changes; distances are measured in the threat's norm, slopes in its dual (L1 for
L-infinity, L2 for L2). If the margin's constant is L near an image, no perturbation smaller than
margin / L fools it.

A mixture has no finite constant: at a boundary between two routes its answer jumps. So the smooth
part is measured along fixed routes, and the jumps by themselves (docs/vmoe.md). Bounds from above
are of single MLPs; attention by dot products has none (Kim et al., ICML 2021).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax
from jaxtyping import Bool, Float

from advmoe_jax.attacks import Threat
from advmoe_jax.attacks.constraints import distance, project, steepest
from advmoe_jax.attacks.losses import margin
from advmoe_jax.attacks.stepwise import select
from advmoe_jax.models.network import Network
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Images, Labels, Logits, Tree

# The largest slope of the GELU in its tanh form.
GELU_SLOPE = 1.1290
_BISECTIONS = 40  # of a segment: float32 has fewer points between two images


class Jumps(NamedTuple):
    """What happens where the route of an image changes on its way to another one.

    Attributes:
        found: whether the two images have different routes.
        logits: float32, L2 norm of the difference of the logits by both routes, at one point.
        margin: float32, the difference of the margin of the first image's label.
        step: float32, distance in the threat's norm between the points on both sides.
    """

    found: Bool[Array, " batch"]
    logits: Float[Array, " batch"]
    margin: Float[Array, " batch"]
    step: Float[Array, " batch"]


def margins(logits: Logits, labels: Labels) -> Float[Array, " batch"]:
    """The right logit minus the largest other one; positive where the answer is right."""
    return -margin(logits, labels)


def slopes(
    function: Callable[[Images], Logits], threat: Threat, images: Images, labels: Labels
) -> Float[Array, " batch"]:
    """Norms of the margins' gradients at images, in the dual of the threat's norm.

    Each bounds the local constant of the margin from below.

    Args:
        function: images -> logits, each image alone.
        threat: its norm.
        images: where.
        labels: of the margins.

    Raises:
        ValueError: if the norm is neither linf nor l2.
    """
    gradient = jax.grad(lambda x: jnp.sum(margins(function(x), labels)))(images)
    return _dual(threat, gradient)


def _dual(threat: Threat, gradient: Images) -> Float[Array, " batch"]:
    flat = gradient.reshape(len(gradient), -1)
    if threat.norm == "linf":
        return jnp.sum(jnp.abs(flat), axis=-1)
    if threat.norm == "l2":
        square = jnp.sum(jnp.square(flat), axis=-1)
        return jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
    raise ValueError(f"slopes are measured in linf or l2, not in {threat.norm}")


def largest_slopes(
    function: Callable[[Images], Logits],
    threat: Threat,
    images: Images,
    labels: Labels,
    *,
    num_steps: int = 20,
) -> Float[Array, " batch"]:
    """The largest slope found in the ball about each image, by ascent on the slope from there.

    Takes what ``slopes`` takes, and the number of steps, each a tenth of the ball's radius long. A
    bound from below of the constant in the ball.
    """

    def step(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        points, best = carry
        here, pull = jax.vjp(lambda x: slopes(function, threat, x, labels), points)
        (gradient,) = pull(jnp.ones_like(here))
        moved = points + threat.epsilon / 10 * steepest(threat, gradient)
        return project(threat, moved, images), jnp.maximum(best, here)

    start = (images, jnp.zeros_like(images, shape=images.shape[:1]))
    points, best = lax.fori_loop(0, num_steps, step, start)
    return jnp.maximum(best, slopes(function, threat, points, labels))


def observed_slopes(
    function: Callable[[Images], Logits],
    threat: Threat,
    images: Images,
    others: Images,
    labels: Labels,
) -> Float[Array, " batch"]:
    """|difference of margins| over the distance, between images and others such as their attacks.

    Jumps on the way count. 0 where both images are the same.
    """
    change = jnp.abs(margins(function(images), labels) - margins(function(others), labels))
    apart = distance(threat, images, others)
    return jnp.where(apart > 0, change / jnp.where(apart > 0, apart, 1.0), 0.0)


def spectral_norm(matrix: Float[Array, "*any rows columns"]) -> Float[Array, "*any"]:
    """The largest singular value of each matrix, exact up to rounding.

    Power iteration would come from below, and what is bounded by it would not be.
    """
    return jnp.linalg.norm(matrix.astype(jnp.float32), 2, axis=(-2, -1))


def mlp_bounds(params: Tree) -> dict[str, list[float]]:
    """Bounds from above of the L2 constant of every MLP of a transformer.

    |W2| |W1| times the GELU's largest slope, by the block's name: one number for a dense MLP, one
    for each expert of a mixture. For a fixed route, in the gate's weights p, a layer of experts has
    at most the sum of the chosen ones' p_e times bound, and what the router adds by moving p.
    """
    part = next(name for name in params if name != "router")
    kernels = {
        path: kernel
        for path, kernel in traverse_util.flatten_dict(params[part], sep="/").items()
        if path.endswith("/kernel") and "/mlp/" in path
    }
    bounds = {}
    for path, kernel in kernels.items():
        if path.endswith("dense1/kernel"):
            second = kernels[path.replace("dense1", "dense2")]
            product = spectral_norm(kernel) * spectral_norm(second) * GELU_SLOPE
            bounds[path.split("/")[0]] = np.atleast_1d(np.asarray(product)).tolist()
    return bounds


@partial(jax.jit, static_argnames="threat")
def jumps(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    others: Images,
    labels: Labels,
    *,
    threat: Threat,
) -> Jumps:
    """The jump of a mixture's answer where its route first differs on the way between images.

    The segment from each image to another one is bisected until its ends, of different routes, are
    as near as numbers allow. There, at the far end, the network is asked twice: by its own route,
    and by the near end's.

    Args:
        network: a mixture.
        params: its parameters.
        stats: its statistics.
        images: where segments begin.
        others: where they end.
        labels: of the images.
        threat: its norm measures distances.
    """

    def experts(x: Images) -> Array:
        return jnp.sort(network.route(params, stats, x)[0].indices, axis=-1)

    def differ(one: Array, other: Array) -> Array:
        return jnp.any(one != other, axis=(1, 2))

    first = experts(images)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        near, far = ends
        middle = (near + far) / 2
        same = ~differ(experts(middle), first)
        return select(same, middle, near), select(same, far, middle)

    near, far = lax.fori_loop(0, _BISECTIONS, halve, (images, others))
    own = network.apply(params, stats, far)[0]
    route = network.route(params, stats, near)[0].indices
    kept = network.apply(params, stats, far, routing=Routing(route))[0].logits
    return Jumps(
        differ(experts(others), first),
        jnp.linalg.norm(own.logits - kept, axis=-1),
        jnp.abs(margins(own.logits, labels) - margins(kept, labels)),
        distance(threat, near, far),
    )


def measured(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    adversarial: Images,
    labels: Labels,
    threat: Threat,
) -> dict[str, Any]:
    """All of it, of a few images: medians and largest values over them.

    Args:
        network: any; with an MLP in each block if it has bounds from above.
        params: its parameters.
        stats: its statistics.
        images: clean, float32 in [0, 1].
        adversarial: their attacks.
        labels: of both.
        threat: the ball, and the norm, linf or l2.

    Returns:
        ``slope`` at the images, ``slope_in_ball``, ``observed`` between images and attacks, each
        with ``median`` and ``largest``; of a mixture the first two ``along_clean_routes``, held
        fixed, and ``jumps`` between each image and the one before it, of those on another route.
        ``mlp_bounds``.
    """
    found: dict[str, Any] = {
        name: _summary(values)
        for name, values in _of_function(
            network, params, stats, images, adversarial, labels, threat=threat
        ).items()
    }
    found["mlp_bounds"] = mlp_bounds(params)
    if not network.is_moe:
        return found
    others = jnp.roll(images, 1, axis=0)
    at = jumps(network, params, stats, images, others, labels, threat=threat)
    where = np.asarray(at.found)
    found["jumps"] = {
        "pairs": int(where.sum()),
        **{
            name: _summary(np.asarray(getattr(at, name))[where])
            for name in ("logits", "margin", "step")
            if where.any()
        },
    }
    return found


@partial(jax.jit, static_argnames="threat")
def _of_function(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    adversarial: Images,
    labels: Labels,
    *,
    threat: Threat,
) -> dict[str, Array]:
    route = None
    if network.is_moe:
        route = Routing(network.route(params, stats, images)[0].indices)

    def free(x: Images) -> Logits:
        return network.apply(params, stats, x)[0].logits

    def held(x: Images) -> Logits:
        return network.apply(params, stats, x, routing=route)[0].logits

    return {
        "slope": slopes(held, threat, images, labels),
        "slope_in_ball": largest_slopes(held, threat, images, labels),
        "observed": observed_slopes(free, threat, images, adversarial, labels),
        "observed_along_clean_routes": observed_slopes(held, threat, images, adversarial, labels),
    }


def _summary(values: Any) -> Mapping[str, float]:
    values = np.asarray(values)
    return {"median": float(np.median(values)), "largest": float(np.max(values))}
