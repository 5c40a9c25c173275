"""What makes a mixture win? Recipes on the digits, measured on images withheld from training.

python -m advmoe_jax.compare --config=configs/compare_recipes_digits.py \\
      --workdir=runs/recipes_digits
"""

import compare_claim_digits
import recipe_rows

ROWS = (
    "dense,certified,certified_shared,pathway,certified_random,certified_consistent,assignment,"
    "assignment_random,assignment_shared,assignment_alone,groups,groups_alone,"
    "dense_average,certified_average,pathway_average"
)


def get_config():
    """The network and length of ``compare_claim_digits.py``; no test image is read."""
    config = compare_claim_digits.get_config()
    config.table = recipe_rows.rows()
    config.rows = ROWS
    config.reference = "dense"
    config.num_seeds = 3
    config.run.data.test_split = "withheld"
    config.run.data.validation_fraction = 0.25
    return config
