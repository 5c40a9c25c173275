"""The paper's claim on all of CIFAR-10 with a narrow ResNet-18: one seed, hours on two CPU cores.

    python -m advmoe_jax.compare --config=configs/compare_claim_cifar10.py \\
      --workdir=runs/claim_cifar10 --config.run.data.path=../shared/data/cifar10_jpeg.tar.gz
"""

import compare_cifar10
import compare_claim_digits
import recipe_rows

RECIPES = ("pathway", "certified_shared", "groups_alone")
GROUPS = (1, 1, 0, 0, 0, 0, 0, 0, 1, 1)  # animals and vehicles


def get_config():
    """``compare_cifar10.py`` with a width and a length that two cores can pay for, and recipes."""
    config = compare_cifar10.get_config()
    recipes = recipe_rows.rows(resolution=32, groups=GROUPS)
    config.table.update({name: recipes[name] for name in RECIPES})
    config.rows = ",".join((compare_claim_digits.ROWS, *RECIPES))
    config.num_seeds = 1
    config.examples = 2000
    config.strong_examples = 500
    config.explained_examples = 500

    config.run.num_epochs = 8
    config.run.model.width = 8
    config.run.model.router.resolution = 16
    config.run.model.router.width = 8
    config.run.model.router.blocks = 2
    config.run.data.source = "image_folder"
    config.run.data.path = "cifar10_jpeg.tar.gz"  # CIFAR-10 as JPEG files, see docs/training.md
    config.run.data.validation_fraction = 0.02
    config.run.evaluation.batch_size = 250
    return config
