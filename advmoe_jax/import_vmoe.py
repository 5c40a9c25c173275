"""Makes a run of a published V-MoE or ViT, of google-research/vmoe.

Examples:
    python -m advmoe_jax.import_vmoe --checkpoint=PREFIX --workdir=runs/published

The run's directory holds what ``evaluate`` needs, and training may start from it
(--config.start.run=...). Classes are in the order of TFDS imagenet2012, 0 to 999 by sorted
WordNet ids, which is an image folder's.
"""

from pathlib import Path

from absl import flags
from rich.console import Console

from advmoe_jax import cli, storage
from advmoe_jax import config as config_lib
from advmoe_jax.config import flatten
from advmoe_jax.defaults import values_of
from advmoe_jax.errors import UserError
from advmoe_jax.published import vmoe_checkpoint
from advmoe_jax.published.vmoe_model import imported, network_of
from advmoe_jax.routing.capacity import Capacity
from advmoe_jax.runs import build, importing

_CONFIG = Path(__file__).parents[1] / "configs" / "vmoe_imagenet.py"

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "path of the files, without .index and .data-...", allow_override=True
)
TOP_K = flags.DEFINE_integer(
    "top_k", 2, "experts per token, which the files do not say", allow_override=True
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    0,
    "side of the images it shall see; 0: of those it was trained on",
    allow_override=True,
)
WORKDIR = cli.workdir_flag("directory of the run to make")
cli.config_flag(str(_CONFIG) if _CONFIG.is_file() else None)


def main() -> None:
    """Reads, converts, writes, and says what came out."""
    if flags.FLAGS["config"].config_filename is None and not flags.FLAGS["config"].value:
        raise UserError("--config is missing; see --help")
    config = cli.config_value()
    if config.family != "vit":
        raise UserError(f"--config is of family {config.family!r}: start from defaults.vit")
    workdir = importing.free_directory(WORKDIR.value)
    arrays = vmoe_checkpoint.read(storage.local_path(CHECKPOINT.value, "checkpoint"))
    network = network_of(arrays, TOP_K.value, IMAGE_SIZE.value)
    own = config.model
    network = network._replace(
        capacity=Capacity(**own.capacity.to_dict()),
        dtype=own.dtype,
        dispatch=own.dispatch,
        block_size=own.block_size,
        remat=own.remat,
    )
    params, stats, classes = imported(arrays, network)
    changes = {f"model.{name}": value for name, value in flatten(values_of(network)).items()}
    changes |= {"ema_decay": 0.0, "data.image_size": network.size.image}
    config = config_lib.with_changes(config, changes)
    config_lib.check(config)
    config = build.settled(config, typed=cli.is_typed("evaluation.attacks"))
    importing.write(config, workdir, params, stats, 0)
    experts = f" with {network.num_experts} experts" if network.num_experts > 1 else ""
    Console().print(
        f"{network.name}{experts}, {classes} classes, images of {network.size.image}x"
        f"{network.size.image}: imported into {workdir}; evaluate it with python -m "
        f"advmoe_jax.evaluate --workdir={workdir}",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    cli.run(main, needs=("checkpoint", "workdir"))
