"""RDI-Nets' table on scikit-learn's digits: dense, RDI by each defence, and RDI-MoE.

``config.run`` is the mixture with exits; the other rows follow from it.

    python -m advmoe_jax.compare --config=configs/compare_rdi_digits.py --workdir=runs/compare_rdi
"""

import rdi_moe_digits
from advmoe_rows import row

from advmoe_jax import defaults

_ONE = {"num_experts": 1, "ratio": 1.0}


def _rdi(title, defence, color, marker, **more):
    changes = {"method": "multi_exit", "model": _ONE, "exits": {"defence": defence}}
    about = f"side exits, half of the images attacked: {title.partition(', ')[2]}"
    return row(title, about, changes, color, marker, "-", **more)


def get_config():
    """The comparison."""
    config = defaults.comparison()
    dense = {"method": "multi_exit", "model": {**_ONE, "exits": ()}}
    config.table = {
        "dense": row(
            "Dense",
            "no side exits, clean images",
            {**dense, "exits": {"defence": "none"}},
            *("#999999", "v", "-"),
        ),
        "dense_at": row(
            "AT (Dense)",
            "no side exits, half of the images attacked",
            {**dense, "exits": {"defence": "main"}},
            *("black", "o", "-"),
        ),
        "rdi_main": _rdi("RDI, main attack", "main", "#56B4E9", "^"),
        "rdi_average": _rdi("RDI, average attack", "average", "#009E73", "s"),
        "rdi_max_average": _rdi(
            "RDI, max-average attack", "max_average", "#D55E00", "D", judged=True
        ),
        "rdi_moe": row(
            "RDI-MoE",
            "a mixture of experts with side exits, by AdvMoE with the exits' losses summed",
            {},
            *("#0072B2", "*", "-"),
        ),
    }
    config.rows = "dense,dense_at,rdi_main,rdi_average,rdi_max_average,rdi_moe"
    config.reference = "dense_at"
    config.attacks = "pgd50,average50,max_average50,slow_down50"
    config.strong_attacks = "autoattack"
    config.strong_examples = 32
    config.explained_examples = 120

    config.run = rdi_moe_digits.get_config()
    config.run.num_epochs = 8
    config.run.model.width = 8
    config.run.evaluation.batch_size = 120
    return config
