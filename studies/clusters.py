"""Linear experts on clustered data: what more experts do to the Lipschitz constant.

``python -m studies.clusters`` prints a table. Points lie in E clusters, each in a subspace of its
own, orthogonal to the others'; labels are random signs, that is noise, and are interpolated exactly
by linear maps of minimum norm: one for all points (dense), or one for each cluster (experts), which
a linear router finds. The L2 norm of such a map is its Lipschitz constant.

Prediction, for orthogonal clusters: the dense map is the sum of the experts', which are orthogonal,
so that |dense|^2 = sum_e |expert_e|^2; of E experts of equal norms the dense map's constant is
sqrt(E) times theirs. Where clusters share a subspace nothing of the kind is promised: the last
column says what becomes of the ratio then.

A router's choice e of x stays the same within the distance
min over e' of (w_e - w_e') x / |w_e - w_e'| (L2): the margin, inside of which the mixture is as
smooth as its experts. Across, it jumps.
"""

from typing import NamedTuple

import numpy as np

POINTS, DIMENSIONS, SEEDS = 128, 512, 5
EXPERTS = (1, 2, 4, 8, 16)


class Found(NamedTuple):
    """Of one draw: constants of the dense map and of the steepest expert, and the least margin."""

    dense: float
    expert: float
    predicted: float
    margin: float
    error: float


def fit(num_experts: int, seed: int, shared: bool = False) -> Found:
    """Draws points, and fits both.

    Args:
        num_experts: clusters.
        seed: of the draw.
        shared: whether all clusters lie in one subspace, about means of their own.
    """
    rng = np.random.default_rng(seed)
    each, width = POINTS // num_experts, DIMENSIONS // num_experts
    points = np.zeros((POINTS, DIMENSIONS))
    router = np.zeros((num_experts, DIMENSIONS))
    clusters = np.repeat(np.arange(num_experts), each)
    for e in range(num_experts):
        own = slice(e * width, (e + 1) * width)
        router[e, own] = 1 / np.sqrt(width)
        rows = clusters == e
        points[rows, own] = 3 + rng.normal(size=(each, width))
        if shared:
            points[rows] += rng.normal(size=(each, DIMENSIONS))
    labels = rng.choice([-1.0, 1.0], POINTS)
    dense = np.linalg.pinv(points) @ labels
    experts = np.stack([np.linalg.pinv(points[clusters == e]) @ labels[clusters == e]
                        for e in range(num_experts)])  # fmt: skip
    scores = points @ router.T
    assert (scores.argmax(axis=1) == clusters).all()
    margin = np.inf
    for e in range(num_experts):
        for other in set(range(num_experts)) - {e}:
            gap = (scores[clusters == e, e] - scores[clusters == e, other]).min()
            margin = min(margin, gap / np.linalg.norm(router[e] - router[other]))
    norms = np.linalg.norm(experts, axis=1)
    answers = np.einsum("nd,nd->n", points, experts[clusters])
    error = max(np.abs(points @ dense - labels).max(), np.abs(answers - labels).max())
    predicted = float(np.sqrt(np.sum(norms**2)))
    return Found(float(np.linalg.norm(dense)), float(norms.max()), predicted, margin, error)


def main() -> None:
    """Prints means over seeds, in Markdown."""
    print(f"{POINTS} points in {DIMENSIONS} dimensions, means of {SEEDS} draws\n")
    print("| E | dense | predicted | steepest expert | dense / expert | sqrt(E) | margin "
          "| dense / expert, shared subspace |")  # fmt: skip
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for num_experts in EXPERTS:
        draws = [fit(num_experts, seed) for seed in range(SEEDS)]
        shared = [fit(num_experts, seed, shared=True) for seed in range(SEEDS)]
        assert max(d.error for d in [*draws, *shared]) < 1e-8
        dense, expert, predicted, margin = (
            np.mean([getattr(d, name) for d in draws])
            for name in ("dense", "expert", "predicted", "margin")
        )
        ratio = np.mean([d.dense / d.expert for d in shared])
        print(
            f"| {num_experts} | {dense:.3f} | {predicted:.3f} | {expert:.3f} | "
            f"{dense / expert:.2f} | {np.sqrt(num_experts):.2f} | {margin:.2f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
