"""The paper's table on scikit-learn's digits: a quarter of an hour on two CPU cores."""

import advmoe_rows
import digits

from advmoe_jax import defaults


def get_config():
    """The comparison; ``run`` is the mixture's config, the other rows follow from it."""
    config = defaults.comparison()
    config.table = advmoe_rows.rows()
    config.rows = (
        "at_dense,at_s_dense,at_sparse,at_moe,advmoe_assignment,advmoe_pathway,"
        "standard_moe,robust_router,robust_experts"
    )
    config.reference = "at_dense"
    config.remark = "**a demonstration: networks this small and short decide nothing**"
    config.strong_examples = 32
    config.explained_examples = 120

    config.run = digits.get_config()
    config.run.num_epochs = 8
    config.run.pruning.epochs = 3
    config.run.model.width = 8
    config.run.model.router.width = 4
    # So small a network is no slower with all experts computed, and compiles in half the time.
    config.run.model.dispatch = "every"
    config.run.evaluation.batch_size = 120
    return config
