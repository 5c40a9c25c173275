"""The rows of the AdvMoE paper's table, for every ``compare_*.py``.

A row differs from the comparison's ``config.run`` in its ``changes`` and in nothing else.

The dissection (Zhang et al., ICCV 2023, section 4: what does a robust router, what do robust
experts contribute?) takes the mixture of ``standard_moe``, trained on clean images, and trains one
half of it robustly while the other stays as it is, parameters and statistics. The load of that
mixture is balanced (importance loss): the router of a collapsed one decides nothing.

- ``robust_router``: the experts are those of ``standard_moe``; the router is trained from there by
  AdvMoE's router update with the paper's objective (TRADES' loss through the gate), since the
  published code's class-to-expert assignment would pay no heed to what these experts have learned;
- ``robust_experts``: the router is that of ``standard_moe``; the experts are trained from there by
  AdvMoE's expert update, gradients clipped: what is sure of clean images is so wrong about attacked
  ones that the first steps would throw it back to chance.

Both are attacked as a whole network by the same attacks as all other rows.
"""

from ml_collections import ConfigDict


def row(title, about, changes, color, marker, linestyle, **more):
    """A row of a table: what it is called, what it changes, how it is drawn."""
    style = {"color": color, "marker": marker, "linestyle": linestyle}
    style |= {name: more.pop(name) for name in ("linewidth",) if name in more}
    row = {"title": title, "about": about, "changes": changes, "style": style}
    return {**row, "builds_on": "", "judged": False, **more}


_DENSE = {"method": "trades", "model": {"num_experts": 1}}
_WIDE = {"method": "trades", "model": {"num_experts": 1, "ratio": 1.0}}


def _advmoe(objective, **changes):
    return {"method": "advmoe", "loss": {"router_objective": objective}, **changes}


def rows():
    """Every row, by name, in the order in which they are run."""
    return ConfigDict(
        {
            "at_dense": row(
                "AT (Dense)",
                "the dense network, adversarial training with TRADES' loss, as in the paper",
                _WIDE,
                *("black", "o", "-"),
            ),
            "at_s_dense": row(
                "AT (S-Dense)",
                "the dense network at the width of one pathway",
                _DENSE,
                *("#555555", "s", "--"),
            ),
            "at_sparse": row(
                "AT (Sparse)",
                "channels of AT (Dense) pruned to the mixture's MACs, HYDRA's way, and trained on",
                {**_WIDE, "method": "hydra"},
                *("#56B4E9", "^", "--"),
                builds_on="at_dense",
            ),
            "at_moe": row(
                "AT (MoE)",
                "the mixture, router and experts in one optimizer step",
                {"method": "joint"},
                *("#009E73", "D", "-"),
            ),
            "advmoe_assignment": row(
                "AdvMoE, assignment",
                "experts and router in turn; the router learns to send class y to expert y mod N, "
                "as in the published code",
                _advmoe("assignment"),
                *("#D55E00", "o", "-"),
                linewidth=2.2,
                judged=True,
            ),
            "advmoe_pathway": row(
                "AdvMoE, pathway",
                "experts and router in turn; the router learns TRADES' loss through its gate, as "
                "in the paper",
                _advmoe("pathway"),
                *("#0072B2", "*", "-"),
                linewidth=2.2,
                judged=True,
            ),
            "advmoe_n4": row(
                "AdvMoE, assignment, N = 4",
                "as AdvMoE, assignment, with four experts: more parameters at the same cost",
                _advmoe("assignment", model={"num_experts": 4}),
                *("#D55E00", "^", "--"),
                judged=True,
            ),
            "advmoe_n8": row(
                "AdvMoE, assignment, N = 8",
                "as AdvMoE, assignment, with eight experts",
                _advmoe("assignment", model={"num_experts": 8}),
                *("#D55E00", "s", ":"),
                judged=True,
            ),
            "standard_moe": row(
                "Standard (MoE)",
                "the mixture, trained on clean images, its load balanced; the dissection starts "
                "from it",
                {"method": "standard", "loss": {"awp": 0.0}, "balance": {"importance": 5.0}},
                *("#E69F00", "v", ":"),
            ),
            "robust_router": row(
                "Robust router only",
                "the experts of Standard (MoE) as they are; its router trained on robustly",
                _advmoe("pathway", start={"frozen": "experts"}),
                *("#CC79A7", "P", ":"),
                builds_on="standard_moe",
            ),
            "robust_experts": row(
                "Robust experts only",
                "the router of Standard (MoE) as it is; its experts trained on robustly",
                _advmoe(
                    "pathway",
                    start={"frozen": "router"},
                    optimizer={"experts": {"clip_norm": 1.0}},
                ),
                *("#B8A800", "X", ":"),
                builds_on="standard_moe",
            ),
        }
    )
