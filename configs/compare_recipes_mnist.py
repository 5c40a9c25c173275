"""What makes a mixture win? Recipes on MNIST, measured on images withheld from training.

python -m advmoe_jax.compare --config=configs/compare_recipes_mnist.py \\
      --workdir=runs/recipes_mnist --config.run.data.path=../shared/data/mnist_png.tar.gz
"""

import compare_claim_mnist
import recipe_rows

ROWS = "dense,pathway,certified,certified_shared,assignment,assignment_shared"


def get_config():
    """The network and length of ``compare_claim_mnist.py``; no test image is read."""
    config = compare_claim_mnist.get_config()
    config.table = recipe_rows.rows(resolution=28)
    config.rows = ROWS
    config.reference = "dense"
    config.strong_attacks = "apgd-t,moe"
    config.strong_examples = 300
    config.explained_examples = 300
    config.run.data.test_split = "withheld"
    return config
