"""Counts what a network costs: parameters and multiply-accumulates per image.

Examples:
    python -m advmoe_jax.cost --model=resnet18_cifar --num_experts=2 --ratio=0.5
    python -m advmoe_jax.cost --model=vgg16_bn --num_experts=2 --router=at_16
    python -m advmoe_jax.cost --model=vit_tiny_8 --num_experts=8 --top_k=2

Nothing is computed, and no parameters are made. docs/costs.md says more.
"""

import json

from absl import flags
from rich.console import Console
from rich.table import Table

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.cost import AFFORDABLE, default_router, keep_for, network_cost
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.models.router import PRESETS
from advmoe_jax.models.vit import SIZES, ViT

MODEL = flags.DEFINE_string(
    "model", None, "name of the network, such as resnet18_cifar", allow_override=True
)
NUM_EXPERTS = flags.DEFINE_integer(
    "num_experts", 1, "kernels per convolution, or MLPs; 1: dense", allow_override=True
)
RATIO = flags.DEFINE_float(
    "ratio", 1.0, "width of one pathway over the dense network's", allow_override=True
)
TOP_K = flags.DEFINE_integer("top_k", 1, "experts per image, or token")
PLACEMENT = flags.DEFINE_string("placement", "every_2", "which blocks of a transformer are MoE")
KEEP = flags.DEFINE_float("keep", 1.0, "share of channels a Sparse network reads")
TARGET = flags.DEFINE_float(
    "target", None, "find the keep that costs this share of the dense network"
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    32,
    "height and width of the images; of a transformer its own by default",
    allow_override=True,
)
NUM_CLASSES = flags.DEFINE_integer("num_classes", 10, "number of logits")
ROUTER = flags.DEFINE_string(
    "router",
    "",
    f"{', '.join(PRESETS)}, per_layer; empty: the first with which an image costs at most "
    f"{AFFORDABLE} of the dense network",
)
JSON = flags.DEFINE_bool("json", False, "print JSON")


def _transformer() -> ViT:
    for flag in (RATIO, KEEP, TARGET, ROUTER):
        if flag.present:
            raise UserError(f"--{flag.name} is for convolutional networks, not for {MODEL.value}")
    return ViT(
        MODEL.value,
        num_experts=NUM_EXPERTS.value,
        top_k=TOP_K.value,
        placement=PLACEMENT.value,
        image_size=IMAGE_SIZE.value if IMAGE_SIZE.present else 0,
    )


def _cnn() -> CNN:
    if ROUTER.value not in ("", "per_layer", *PRESETS):
        raise UserError(
            f"--router={ROUTER.value} is unknown; choose one of {', '.join(PRESETS)}, per_layer"
        )
    router = RouterSettings.of(PRESETS.get(ROUTER.value, PRESETS["published"]))
    if ROUTER.value == "per_layer":
        router = router._replace(scope="per_layer")
    return CNN(
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
    if TARGET.value is not None and not 0 < TARGET.value < 1:
        raise UserError(f"--target={TARGET.value} must lie in (0, 1)")
    side = IMAGE_SIZE.value
    if MODEL.value in SIZES:
        network = _transformer()
        side = network.size.image
    else:
        network = _cnn()
    shape = (side, side, 3)
    if TARGET.value:
        keep = keep_for(network, shape, NUM_CLASSES.value, TARGET.value)
        network = network._replace(keep=keep)
    if isinstance(network, CNN) and not ROUTER.value and NUM_EXPERTS.value > 1:
        size = PRESETS[default_router(network, shape, NUM_CLASSES.value)]
        network = network._replace(router=RouterSettings.of(size))
    cost = network_cost(network, shape, NUM_CLASSES.value)
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
    if isinstance(network, CNN) and network.keep < 1:
        console.print(f"config.model.keep={network.keep}", highlight=False)


if __name__ == "__main__":
    cli.run(main, needs=("model",))
