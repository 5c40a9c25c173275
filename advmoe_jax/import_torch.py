"""Makes a run of a published checkpoint: ``python -m advmoe_jax.import_torch --checkpoint=...``.

The run directory holds what ``evaluate`` needs. Its config is the one given (by default that of
the published code's main setting), with the network that the checkpoint is of.
"""

import re
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.published import torch_checkpoint, torch_names
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint
from advmoe_jax.runs import build, directory

_CONFIG = Path(__file__).parents[1] / "configs" / "cifar10_resnet18.py"
_OF_A_RUN = (directory.CHECKPOINTS, directory.WEIGHTS, "metrics.jsonl", "results.json")

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
    workdir = Path(WORKDIR.value).expanduser()
    if any((workdir / name).exists() for name in _OF_A_RUN):
        raise UserError(f"{workdir} holds a run already: use another --workdir")
    checkpoint = torch_checkpoint.read(Path(CHECKPOINT.value).expanduser())
    describe(config, checkpoint)
    config_lib.check(config)
    config.ema_decay = 0.0  # the file holds one set of weights
    config = build.settled(config, typed=cli.is_typed("evaluation.attacks"))
    try:
        params, stats = torch_checkpoint.arrays_of(build.architecture(config), checkpoint)
    except UserError as error:
        raise UserError(f"{CHECKPOINT.value} does not fit {_network(config)}: {error}") from None
    workdir = directory.create(str(workdir))
    config_lib.save(config, workdir / "config.json")
    state = {"params": params, "stats": stats, "step": np.int32(checkpoint.epoch)}
    with directory.open_checkpoints(config, workdir) as checkpointer:
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
    dense = NUM_EXPERTS.value == 1
    model = config.model
    model.name, model.num_experts = MODEL.value, NUM_EXPERTS.value
    model.ratio = (1.0 if dense else 0.5) if RATIO.value is None else RATIO.value
    model.width, model.top_k, model.gate = WIDTH.value, 1, "straight_through"
    model.dtype = model.param_dtype = "float32"
    # Of the published wide ResNets, the dense CIFAR form alone widens activations.
    is_raw = MODEL.value.startswith("wrn_") and not (dense and MODEL.value.endswith("_cifar"))
    model.raw_widening = is_raw if RAW_WIDENING.value is None else RAW_WIDENING.value
    model.mean, model.std = normalization(checkpoint)
    if not dense:
        describe_router(model.router, checkpoint)
    elif config.method in ("joint", "advmoe"):
        config.method = "trades"  # the published code's method for dense networks


def normalization(checkpoint: TorchCheckpoint) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the file's, or none at all where the published code would not normalise."""
    ignored = NORMALIZE.value == "auto" and MODEL.value.startswith(
        torch_names.WITHOUT_NORMALIZATION
    )
    if checkpoint.mean is None or checkpoint.std is None:
        if NORMALIZE.value == "file":
            raise UserError(f"--normalize=file, but {CHECKPOINT.value} holds no normalisation")
        ignored = True
    if ignored or NORMALIZE.value == "none":
        return (0.0,), (1.0,)
    return checkpoint.mean, checkpoint.std


def describe_router(router: ConfigDict, checkpoint: TorchCheckpoint) -> None:
    """Sets the size that the file's router has, one for the whole network at full resolution."""
    stem = checkpoint.tensors.get("router.conv1.weight")
    if stem is None:
        raise UserError(
            f"{CHECKPOINT.value} holds no router: give --num_experts=1 if it is of a dense network"
        )
    blocks = [re.fullmatch(r"router\.layer1\.\d+\.conv1\.weight", x) for x in checkpoint.tensors]
    router.width = max(1, *stem.shape[:1])
    router.blocks = max(1, sum(map(bool, blocks)))
    for name, value in (("scope", "global"), ("resolution", 0)):
        if name in router:
            router[name] = value


def _network(config: ConfigDict) -> str:
    model = config.model
    return f"{model.name} with num_experts={model.num_experts}, ratio={model.ratio:g}"


if __name__ == "__main__":
    cli.run(main, needs=("checkpoint", "model", "workdir"))
