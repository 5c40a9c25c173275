"""Makes a run of a checkpoint of the published PyTorch code of AdvMoE or RDI-Nets.

Examples:
    python -m advmoe_jax.import_torch --checkpoint=FILE.pth.tar --model=resnet18_cifar \\
        --workdir=runs/published

The run's directory holds what ``evaluate`` needs. Its config is the one given (by default
configs/cifar10_resnet18.py), with the network that the checkpoint is of. Nothing in the file is
executed. docs/published_checkpoints.md says more.
"""

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import cli, storage
from advmoe_jax import config as config_lib
from advmoe_jax.config import flatten
from advmoe_jax.defaults import values_of
from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN
from advmoe_jax.published import torch_checkpoint
from advmoe_jax.published.torch_model import network_of
from advmoe_jax.runs import build, importing

_CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet18.py"

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the published .pth.tar file", allow_override=True
)
MODEL = flags.DEFINE_string(
    "model", None, "name of the network, such as resnet18_cifar", allow_override=True
)
NUM_EXPERTS = flags.DEFINE_integer(
    "num_experts", 2, "experts per convolution; 1: a dense network", allow_override=True
)
RATIO = flags.DEFINE_float(
    "ratio", None, "width of one pathway; 0.5, or 1 for a dense network", allow_override=True
)
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
    if config.family != "cnn":
        raise UserError(f"--config is of family {config.family!r}: start from defaults.cnn")
    workdir = importing.free_directory(WORKDIR.value)
    checkpoint = torch_checkpoint.read(storage.local_path(CHECKPOINT.value, "checkpoint"))
    network = network_of(
        checkpoint,
        name=MODEL.value,
        num_experts=NUM_EXPERTS.value,
        ratio=RATIO.value,
        width=WIDTH.value,
        normalize=NORMALIZE.value,
        raw_widening=RAW_WIDENING.value,
    )
    config = _of_network(config, network)
    try:
        params, stats = torch_checkpoint.arrays_of(network, checkpoint)
    except UserError as error:
        raise UserError(f"{CHECKPOINT.value} does not fit {_described(network)}: {error}") from None
    importing.write(config, workdir, params, stats, checkpoint.epoch)
    Console().print(
        f"{_described(network)}, epoch {checkpoint.epoch} in the file: imported into {workdir}; "
        f"evaluate it with python -m advmoe_jax.evaluate --workdir={workdir}",
        soft_wrap=True,
        highlight=False,
    )


def _of_network(config: ConfigDict, network: CNN) -> ConfigDict:
    """The config of a run of that network."""
    model = config.model
    network = network._replace(
        dispatch=model.dispatch, block_size=model.block_size, remat=model.remat
    )
    changes = {f"model.{name}": value for name, value in flatten(values_of(network)).items()}
    changes["ema_decay"] = 0.0  # the file holds one set of weights
    if network.num_experts == 1 and config.method in ("joint", "advmoe"):
        changes["method"] = "trades"  # the published code's method for dense networks
    config = config_lib.with_changes(config, changes)
    config_lib.check(config)
    return build.settled(config, typed=cli.is_typed("evaluation.attacks"))


def _described(network: CNN) -> str:
    return f"{network.name} with num_experts={network.num_experts}, ratio={network.ratio:g}"


if __name__ == "__main__":
    cli.run(main, needs=("checkpoint", "model", "workdir"))
