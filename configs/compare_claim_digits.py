"""The paper's claim on the digits: networks trained to the end, five seeds; hours on two CPU cores.

python -m advmoe_jax.compare --config=configs/compare_claim_digits.py \\
      --workdir=runs/claim_digits
"""

import compare_digits

ROWS = "at_dense,at_s_dense,at_moe,advmoe_assignment,advmoe_pathway,advmoe_n4,advmoe_n8"


def get_config():
    """The network, length and attacks of ``digits.py``, which ``make run`` trains."""
    config = compare_digits.get_config()
    config.remark = ""
    config.rows = ROWS
    config.num_seeds = 5
    config.strong_examples = 200
    config.explained_examples = 200

    config.run.num_epochs = 32
    config.run.model.width = 16
    config.run.model.router.width = 8
    config.run.model.dispatch = "auto"
    config.run.evaluation.batch_size = 200
    config.run.checkpoint.keep = 1
    return config
