"""The rows of the study of V-MoE's robustness, for every ``compare_vmoe_*.py``.

ViT against V-MoE of growing numbers of experts E and experts per token k. With k = 1 an image costs
what it costs the ViT, but for its scores; with k = 2 the MLPs of the MoE blocks cost twice as much,
and ``vit_wide``, whose MLPs are half as wide again in all blocks, is the dense network of that
cost. The router's noise is 1/E, as published.
"""

from functools import partial

from advmoe_rows import row
from ml_collections import ConfigDict

EXPERTS, TOP_K = (2, 4, 8, 16), (1, 2)
_COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#D55E00")
_MARKERS = ("v", "s", "D", "o")


def _moe(experts, top_k):
    return {
        "model": {"num_experts": experts, "top_k": top_k},
        "balance": {"noise": 1 / experts},
    }


def rows(hidden):
    """Every row, by name, in the order in which they are run; ``hidden``: units of ViT's MLPs."""
    dense = {"num_experts": 1, "top_k": 1}
    judged = partial(row, judged=True)
    table = {
        "vit": row(
            "ViT", "the dense network, adversarial training", {"model": dense},
            *("black", "o", "-"),
        ),
        "vit_wide": judged(
            "ViT, wide", "its MLPs half as wide again: the cost of k = 2",
            {"model": {**dense, "hidden": hidden * 3 // 2}}, *("#555555", "s", "--"),
        ),
    }  # fmt: skip
    for top_k, linestyle in zip(TOP_K, ("-", "--"), strict=True):
        for experts, colour, marker in zip(EXPERTS, _COLOURS, _MARKERS, strict=True):
            table[f"e{experts}_k{top_k}"] = judged(
                f"V-MoE, E = {experts}, k = {top_k}",
                f"{experts} experts in every second block, {top_k} per token, adversarial training",
                _moe(experts, top_k),
                *(colour, marker, linestyle),
            )
    table["advmoe_e4_k1"] = judged(
        "AdvMoE, E = 4, k = 1",
        "the same mixture, router and experts in turn, by TRADES' loss through the gate",
        {**_moe(4, 1), "method": "advmoe"},
        *("#CC79A7", "*", "-"),
    )
    table["standard_vit"] = row(
        "ViT, standard", "trained on clean images", {"method": "standard", "model": dense},
        *("#B8A800", "P", ":"),
    )  # fmt: skip
    table["standard_e4_k1"] = row(
        "V-MoE, E = 4, k = 1, standard",
        "trained on clean images",
        {**_moe(4, 1), "method": "standard"},
        *("#E69F00", "X", ":"),
    )
    return ConfigDict(table)
