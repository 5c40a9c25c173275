"""The paper's claim on MNIST, epsilon 0.3, with short runs: three seeds, hours on two CPU cores.

    python -m advmoe_jax.compare --config=configs/compare_claim_mnist.py \\
      --workdir=runs/claim_mnist --config.run.data.path=../shared/data/mnist_png.tar.gz
"""

import compare_claim_digits
import compare_mnist


def get_config():
    """``compare_mnist.py`` with a network and a length that two cores can pay for."""
    config = compare_mnist.get_config()
    config.rows = compare_claim_digits.ROWS
    config.examples = 1000
    config.strong_examples = 200
    config.explained_examples = 200

    config.run.num_epochs = 4
    config.run.model.width = 8
    config.run.data.source = "image_folder"
    config.run.data.path = "mnist_png.tar.gz"  # MNIST as PNG files, see docs/training.md
    config.run.evaluation.batch_size = 200
    config.run.evaluation.validation_steps = 15  # of 0.02: across the ball
    config.run.checkpoint.keep = 1
    return config
