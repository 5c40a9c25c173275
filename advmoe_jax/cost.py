"""What a network costs: ``python -m advmoe_jax.cost --model=resnet18_cifar --num_experts=2``.

Nothing is computed, and no parameters are made.
"""

import json

from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import AFFORDABLE, default_router, keep_for, network_cost
from advmoe_jax.models import registry
from advmoe_jax.models.router import PRESETS

MODEL = flags.DEFINE_string("model", None, "name of the network, such as resnet18_cifar")
NUM_EXPERTS = flags.DEFINE_integer("num_experts", 1, "kernels per convolution; 1: dense")
RATIO = flags.DEFINE_float("ratio", 1.0, "width of one pathway over the dense network's")
TOP_K = flags.DEFINE_integer("top_k", 1, "experts per image")
KEEP = flags.DEFINE_float("keep", 1.0, "share of channels a Sparse network reads")
TARGET = flags.DEFINE_float(
    "target", 0.0, "find the keep that costs this share of the dense network"
)
IMAGE_SIZE = flags.DEFINE_integer("image_size", 32, "height and width of the images")
NUM_CLASSES = flags.DEFINE_integer("num_classes", 10, "number of logits")
ROUTER = flags.DEFINE_string(
    "router",
    "",
    f"{', '.join(PRESETS)}, per_layer; empty: the first with which an image costs at most "
    f"{AFFORDABLE} of the dense network",
)
JSON = flags.DEFINE_bool("json", False, "print JSON")


def _model_config() -> ConfigDict:
    if ROUTER.value not in ("", "per_layer", *PRESETS):
        raise UserError(
            f"--router={ROUTER.value} is unknown; choose one of {', '.join(PRESETS)}, per_layer"
        )
    router = PRESETS.get(ROUTER.value, PRESETS["published"])._asdict()
    router["scope"] = "per_layer" if ROUTER.value == "per_layer" else "global"
    return registry.model_config(
        MODEL.value,
        num_experts=NUM_EXPERTS.value,
        ratio=RATIO.value,
        top_k=TOP_K.value,
        keep=KEEP.value,
        router=router,
    )


def main() -> None:
    """Prints the cost of the network that the flags describe."""
    for flag in (IMAGE_SIZE, NUM_CLASSES):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value} must be at least 1")
    if not 0 <= TARGET.value < 1:
        raise UserError(f"--target={TARGET.value} must lie in (0, 1)")
    shape = (IMAGE_SIZE.value, IMAGE_SIZE.value, 3)
    config = _model_config()
    if TARGET.value:
        config.keep = keep_for(config, shape, NUM_CLASSES.value, TARGET.value)
    if not ROUTER.value and NUM_EXPERTS.value > 1:
        size = PRESETS[default_router(config, shape, NUM_CLASSES.value)]
        config.router.update(size._asdict())
    cost = network_cost(config, shape, NUM_CLASSES.value)
    if JSON.value:
        print(json.dumps(cost, indent=2))
        return
    table = Table("", *dict.fromkeys([*cost["params"], *cost["macs"]]), box=None)
    for row, values in cost.items():
        cells = (f"{values[str(c.header)]:,}" if c.header in values else "" for c in table.columns)
        table.add_row({"params": "parameters", "macs": "MACs per image"}[row], *list(cells)[1:])
    for column in table.columns[1:]:
        column.justify = "right"
    console = Console()
    console.print(table)
    share = cost["macs"]["total"] / cost["macs"]["dense"]
    console.print(f"{share:.3f} of the dense network's MACs", highlight=False)
    if config.keep < 1:
        console.print(f"config.model.keep={config.keep}", highlight=False)


if __name__ == "__main__":
    cli.run(main, needs=("model",))
