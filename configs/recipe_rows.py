"""Recipes for a mixture that is to win, one change at a time, beside dense networks.

All are trained by TRADES' losses; every mixture costs at most half of the dense network's MACs,
its router included. The router of the ``certified`` rows is linear in the pixels and next to free:
what it leaves is spent on wider pathways.
"""

from advmoe_rows import row
from ml_collections import ConfigDict

AVERAGE = {"ema_decay": 0.99}
SHARED = {"start": {"equal_experts": True}, "balance": {"shared_steps": 0.7}}
RATIO = 0.67  # of ResNet-10's pathways beside a linear router, at 0.47 of the dense network's MACs

# Digits that a robust dense network confuses under attack share an expert: of all halves, this one
# has the fewest confusions across (APGD-T, withheld images, seed 0).
GROUPS = (0, 1, 1, 1, 0, 0, 0, 0, 1, 1)
JUDGED = {"judged": True}


def _dense(ratio, **changes):
    return {"method": "trades", "model": {"num_experts": 1, "ratio": ratio}, **changes}


def _assignment(loss=None, **changes):
    loss = {"router_objective": "assignment", **(loss or {})}
    return {"method": "advmoe", "loss": loss, **changes}


def _certified(resolution, loss=None, **changes):
    return {
        "method": "advmoe",
        "loss": {"router_objective": "certified", **(loss or {})},
        "model": {"ratio": RATIO, "router": {"blocks": 0, "resolution": resolution}},
        "optimizer": {"router": {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.0}},
        **changes,
    }


def rows(resolution=8, groups=GROUPS):
    """Every row, by name.

    Args:
        resolution: of the pixels that a linear router sees.
        groups: the expert of each class in the rows of groups.
    """
    certified = _certified_rows(resolution)
    return ConfigDict({**_dense_rows(), **_assignment_rows(groups), **certified})


def _dense_rows():
    return {
        "dense": row("Dense", "TRADES, as in the paper", _dense(1.0), *("black", "o", "-")),
        "dense_average": row(
            "Dense, EMA",
            "the same, its weights averaged over some hundred steps",
            _dense(1.0, **AVERAGE),
            *("black", "s", "--"),
        ),
        "pathway": row(
            "Dense, at a pathway's width",
            "what a certified row's pathway is without any routing",
            _dense(RATIO),
            *("#555555", "D", ":"),
        ),
        "pathway_average": row(
            "Dense, at a pathway's width, EMA",
            "the same, averaged",
            _dense(RATIO, **AVERAGE),
            *("#555555", "^", "-"),
        ),
    }


def _assignment_rows(groups):
    return {
        "assignment": row(
            "Assignment",
            "AdvMoE as published",
            _assignment(),
            *("#D55E00", "o", "-"),
            **JUDGED,
        ),
        "assignment_random": row(
            "Assignment, random routes",
            "half of the images take random routes in every step",
            _assignment(balance={"random_share": 0.5}),
            *("#D55E00", "^", "--"),
            **JUDGED,
        ),
        "assignment_alone": row(
            "Assignment, router attacked alone",
            "the router's update is attacked by the divergence of its scores alone",
            _assignment({"router_attack": "scores"}),
            *("#CC79A7", "o", "-"),
            **JUDGED,
        ),
        "groups": row(
            "Groups of classes",
            "classes that are often taken for each other share an expert",
            _assignment({"class_experts": groups}),
            *("#E69F00", "o", "-"),
            **JUDGED,
        ),
        "groups_alone": row(
            "Groups of classes, router attacked alone",
            "both",
            _assignment({"class_experts": groups, "router_attack": "scores"}),
            *("#E69F00", "^", "--"),
            **JUDGED,
        ),
        "assignment_shared": row(
            "Assignment, shared steps",
            "experts start as one, and each takes most of the other's steps too",
            _assignment(**SHARED),
            *("#D55E00", "s", ":"),
            **JUDGED,
        ),
    }


def _certified_rows(resolution):
    return {
        "certified": row(
            "Certified",
            "a linear router whose routes an attacker can seldom move, and wider pathways",
            _certified(resolution),
            *("#0072B2", "o", "-"),
            **JUDGED,
        ),
        "certified_random": row(
            "Certified, random routes",
            "the same; a quarter of the images take random routes in every step",
            _certified(resolution, balance={"random_share": 0.25}),
            *("#0072B2", "^", "--"),
            **JUDGED,
        ),
        "certified_consistent": row(
            "Certified, consistent pathways",
            "the same; the other pathway is to answer attacked images alike",
            _certified(resolution, loss={"consistency": 3.0}),
            *("#0072B2", "s", ":"),
            **JUDGED,
        ),
        "certified_shared": row(
            "Certified, shared steps",
            "the same; experts start as one, and each takes most of the other's steps too",
            _certified(resolution, **SHARED),
            *("#009E73", "o", "-"),
            **JUDGED,
        ),
        "certified_average": row(
            "Certified, EMA",
            "the same, averaged",
            _certified(resolution, **AVERAGE),
            *("#56B4E9", "D", "-"),
            **JUDGED,
        ),
    }
