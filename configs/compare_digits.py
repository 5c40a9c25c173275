"""The paper's table on scikit-learn's digits: a quarter of an hour on two CPU cores."""

import digits
from ml_collections import ConfigDict


def get_config():
    """Every value of the comparison."""
    config = ConfigDict()
    config.rows = (
        "at_dense,at_s_dense,at_sparse,at_moe,advmoe_assignment,advmoe_pathway,"
        "standard_moe,robust_router,robust_experts"
    )
    config.num_seeds = 3  # from run.seed on
    config.attacks = "pgd50"  # the router agreement is that under the first
    config.examples = 0  # test images; 0: all
    config.strong_attacks = "autoattack,moe"  # evaluated on fewer images
    config.strong_examples = 32
    config.explained_attack = "pgd20"
    config.explained_examples = 120
    config.sparse_keep = 0.0  # share of channels of the Sparse network; 0: at the mixture's MACs

    config.run = digits.get_config()  # of the mixture; the other rows follow from it
    config.run.num_epochs = 8
    config.run.pruning.epochs = 3
    config.run.model.width = 8
    config.run.model.router.width = 4
    # So small a network is no slower with all experts computed, and compiles in half the time.
    config.run.model.dispatch = "every"
    config.run.evaluation.batch_size = 120
    return config
