"""Makes a run of a published checkpoint: ``python -m advmoe_jax.import_torch --checkpoint=...``.

The run directory holds what ``evaluate`` needs. Its config is the one given (by default that of
the published code's main setting), with the network that the checkpoint is of.
"""

from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import cli, experiment
from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.published import torch_checkpoint
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint
from advmoe_jax.published.torch_model import describe_model

_CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet18.py"
_OF_A_RUN = (experiment.CHECKPOINTS, experiment.WEIGHTS, "metrics.jsonl", "results.json")

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the published .pth.tar file", allow_override=True
)
MODEL = flags.DEFINE_string("model", None, "name of the network, such as resnet18_cifar")
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 2, "experts per convolution; 1: a dense network")
RATIO = flags.DEFINE_float("ratio", None, "width of one pathway; 0.5, or 1 for a dense network")
WIDTH = flags.DEFINE_integer("width", 0, "channels of the first layer at ratio 1; 0: published")
NORMALIZE = flags.DEFINE_enum(
    "normalize", "auto", ["auto", "file", "none"], "auto: as the published code would"
)
RAW_WIDENING = flags.DEFINE_bool(
    "raw_widening", None, "wide ResNets: see config.model.raw_widening; default: as published"
)
WORKDIR = cli.workdir_flag("directory of the run to make")
cli.config_flag(str(_CONFIG) if _CONFIG.is_file() else None)


def main() -> None:
    """Reads, converts, writes, and says what came out."""
    if flags.FLAGS["config"].config_filename is None and not flags.FLAGS["config"].value:
        raise UserError("--config is missing; see --help")
    config = cli.config_value()
    workdir = Path(WORKDIR.value).expanduser()
    if any((workdir / name).exists() for name in _OF_A_RUN):
        raise UserError(f"{workdir} holds a run already: use another --workdir")
    checkpoint = torch_checkpoint.read(Path(CHECKPOINT.value).expanduser())
    describe(config, checkpoint)
    config_lib.check(config)
    config.ema_decay = 0.0  # the file holds one set of weights
    try:
        params, stats = torch_checkpoint.arrays_of(config.model, checkpoint)
    except UserError as error:
        raise UserError(f"{CHECKPOINT.value} does not fit {_network(config)}: {error}") from None
    workdir = experiment.create_workdir(str(workdir))
    config_lib.save(config, workdir / "config.json")
    state = {"params": params, "stats": stats, "step": np.int32(checkpoint.epoch)}
    with experiment.open_checkpoints(config, workdir) as checkpointer:
        # The published file's best_acc is of the test set, and perhaps of another epoch: 0 ranks
        # this checkpoint below whatever is measured here.
        checkpointer.save(checkpoint.epoch, {"state": state}, 0.0)
    Console().print(
        f"{_network(config)}, {checkpoint.epoch} epochs: imported into {workdir}; evaluate it with "
        f"python -m advmoe_jax.evaluate --workdir={workdir}",
        soft_wrap=True,
        highlight=False,
    )


def describe(config: ConfigDict, checkpoint: TorchCheckpoint) -> None:
    """Replaces what the config says of the network by what the flags and the file say of it."""
    describe_model(
        config.model,
        checkpoint,
        name=MODEL.value,
        num_experts=NUM_EXPERTS.value,
        ratio=RATIO.value,
        width=WIDTH.value,
        normalize=NORMALIZE.value,
        raw_widening=RAW_WIDENING.value,
    )
    if NUM_EXPERTS.value > 1:
        return
    if config.method in ("joint", "advmoe"):
        config.method = "trades"  # the published code's method for dense networks
    attacks = config.evaluation.attacks.split(",")
    config.evaluation.attacks = ",".join(a for a in attacks if not a.startswith("router"))


def _network(config: ConfigDict) -> str:
    model = config.model
    return f"{model.name} with num_experts={model.num_experts}, ratio={model.ratio:g}"


if __name__ == "__main__":
    cli.run(main, needs=("checkpoint", "model", "workdir"))
