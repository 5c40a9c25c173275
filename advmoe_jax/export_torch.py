"""Writes a run's network as a checkpoint of the published PyTorch code.

Examples:
    python -m advmoe_jax.export_torch --workdir=runs/published --checkpoint=copy.pth.tar
"""

from absl import flags
from flax import traverse_util
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.published import rdi, torch_checkpoint, torch_names
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint
from advmoe_jax.runs import directory

WORKDIR = cli.workdir_flag("directory of the run")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "the .pth.tar file to write", allow_override=True
)
WHICH = flags.DEFINE_enum("which", "best", ["best", "last"], "which of the run's checkpoints")


def main() -> None:
    """Restores, converts, writes."""
    workdir = directory.located(WORKDIR.value)
    config = directory.read_config(workdir)
    model = config.model
    if config.family != "cnn":
        raise UserError(
            f"{workdir} holds a {model.name}: the published PyTorch code has convolutional networks"
        )
    if model.num_experts > 1 and model.router.get("scope", "global") != "global":
        raise UserError(
            f"model.router.scope={model.router.scope!r} cannot be exported: the published code has "
            "one router for all layers"
        )
    published = rdi.NETWORKS.get(model.name)
    if model.exits and (published is None or tuple(model.exits) != published.exits):
        raise UserError(
            f"model.exits={tuple(model.exits)} cannot be exported: the published {model.name} has "
            f"{published.exits if published else 'none'}"
        )
    with directory.open_checkpoints(config, workdir) as checkpointer:
        best = WHICH.value == "best"
        found = (checkpointer.restore_best if best else checkpointer.restore_latest)(None)
    if found is None:
        raise UserError(f"{workdir} has no intact checkpoint to export; train first")
    state = traverse_util.unflatten_dict(found[1], sep="/")["state"]
    state = state.get("average", state)
    tensors = torch_names.to_torch(model.name, state["params"], state["stats"])
    normalizes = (*model.mean, *model.std) != (0.0,) * len(model.mean) + (1.0,) * len(model.std)
    path = directory.located(CHECKPOINT.value, "checkpoint")
    torch_checkpoint.write(
        path,
        TorchCheckpoint(
            tensors,
            tuple(model.mean) if normalizes else None,
            tuple(model.std) if normalizes else None,
            published.arch
            if published
            else f"{model.name}_{'moe' if model.num_experts > 1 else 'ori'}",
            found[0],
        ),
    )
    console = Console(highlight=False)
    console.print(f"checkpoint of step {found[0]} exported to {path}", soft_wrap=True)
    if normalizes and model.name.startswith(torch_names.WITHOUT_NORMALIZATION):
        console.print(
            f"note: the published {model.name} has no normalisation; import with --normalize=file "
            "to have this one's",
            soft_wrap=True,
        )


if __name__ == "__main__":
    cli.run(main, needs=("workdir", "checkpoint"))
