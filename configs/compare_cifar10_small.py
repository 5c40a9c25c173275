"""The paper's table on a twentieth of CIFAR-10 with a narrow ResNet-10, for two CPU cores.

    python -m advmoe_jax.compare --config=configs/compare_cifar10_small.py \\
      --workdir=runs/cifar10_small --config.run.data.path=../shared/data/cifar10_jpeg.tar.gz
"""

import cifar10_resnet18
import compare_digits


def get_config():
    """What differs from the comparison named above."""
    config = compare_digits.get_config()
    config.examples = 500
    config.strong_examples = 32
    config.explained_examples = 200

    config.run = run = cifar10_resnet18.get_config()
    run.num_epochs = 6
    run.batch_size = 64
    run.pruning.epochs = 2
    run.model.name = "resnet10_cifar"
    run.model.width = 8
    run.model.router.resolution = 8
    run.model.router.width = 8
    run.model.router.blocks = 1
    run.data.source = "image_folder"
    run.data.path = "cifar10_jpeg.tar.gz"  # CIFAR-10 as JPEG files, see docs/training.md
    run.data.train_examples = 2560
    run.data.validation_fraction = 0.01
    run.evaluation.batch_size = 125
    run.evaluation.validation_steps = 5
    return config
