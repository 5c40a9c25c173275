"""ViT against V-MoE on 6,000 images of MNIST in patches of 7 x 7, for two CPU cores.

    python -m advmoe_jax.compare --config=configs/compare_vmoe_mnist_small.py \\
      --workdir=runs/vmoe_mnist_small --config.run.data.path=../shared/data/mnist_png.tar.gz
"""

import compare_vmoe_digits
import vmoe_mnist


def get_config():
    """What differs from ``compare_vmoe_digits.py``; so narrow a network learns at epsilon 0.05."""
    config = compare_vmoe_digits.get_config()
    config.examples = 500
    config.strong_attacks = "autoattack,frozen_route"
    config.explained_examples = 500

    config.run = run = vmoe_mnist.get_config()
    run.num_epochs = 10
    run.batch_size = 64
    run.model.patch = 7
    run.model.width = 32
    run.model.hidden = 64
    run.data.source = "image_folder"
    run.data.path = "mnist_png.tar.gz"  # MNIST as PNG files, see docs/training.md
    run.data.train_examples = 6000
    run.data.crop_padding = 0
    run.attack.epsilon = 0.05
    run.attack.num_steps = 3
    run.attack.step_size = 0.03
    run.evaluation.step_size = 0.005
    run.evaluation.batch_size = 250
    run.evaluation.validation_steps = 5
    for group in (run.optimizer.experts, run.optimizer.router):
        group.learning_rate = 3e-3
    return config
