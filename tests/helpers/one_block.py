"""Commands on a ResNet of one block, which compiles in seconds.

``python tests/helpers/one_block.py advmoe_jax.train --workdir=...`` runs a command in a process of
its own, which finds ``gs://`` and ``s3://`` in ``buckets`` if ADVMOE_BUCKETS is set.
"""

import os
import runpy
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

SCRIPT = Path(__file__)
REPOSITORY = SCRIPT.parents[2]
SMALL = {
    "model.name": "resnet4_cifar",
    "model.width": 4,
    "model.router.width": 4,
    "model.router.blocks": 1,
    "batch_size": 16,
    "attack.num_steps": 1,
    "evaluation.validation_steps": 1,
}


def flags(values, config="digits"):
    """The words of a command line for these values of a config."""
    own = [f"--config.{name}={value}" for name, value in values.items()]
    return [f"--config=configs/{config}.py", *own]


def add(setitem=dict.__setitem__):
    """Makes the network known by the name ``resnet4_cifar``."""
    from advmoe_jax.models import cnn, resnet

    setitem(resnet.DEPTHS, 4, resnet.Stages((1,), bottleneck=False))
    ten = cnn.BACKBONES["resnet10_cifar"]
    setitem(cnn.BACKBONES, "resnet4_cifar", partial(ten.func, 4, *ten.args[1:]))


def storage():
    """What a process finds behind ``gs://`` and ``s3://``."""
    import buckets

    return buckets.registered() if "ADVMOE_BUCKETS" in os.environ else nullcontext()


if __name__ == "__main__":
    with storage():
        sys.path[0] = str(REPOSITORY)
        add()
        if sys.argv[1] == "-m":  # as launch/local.sh calls Python
            del sys.argv[1]
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
