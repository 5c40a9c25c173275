"""What TensorBoard shows of a run in training besides curves: router scores, attacked images."""

import io
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation.explanation import choose_examples
from advmoe_jax.evaluation.glance import Glance, glance
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.models.network import Network
from advmoe_jax.reports.explanation import image_grid
from advmoe_jax.runs import build
from advmoe_jax.runs.build import Images
from advmoe_jax.training.log import Shown
from advmoe_jax.types import Tree

_IMAGES = 256  # that histograms are of
_DRAWN = 8


def create_showing(
    config: ConfigDict, network: Network, images: Images
) -> Callable[[Tree, Tree, int], Shown | None]:
    """(params, stats, epoch) -> what is shown, every ``evaluation.show_every`` epochs; else None.

    Of the first validation images, under the attack that validates. One process does it, on one of
    its devices.
    """
    every, key = config.evaluation.show_every, build.keys(config.seed).evaluation
    attack = named_attack(
        f"pgd{config.evaluation.validation_steps}", build.protocol(config), network.parts
    )

    def show(params: Tree, stats: Tree, epoch: int) -> Shown | None:
        if not every or (epoch + 1) % every:
            return None
        at = np.arange(min(_IMAGES, len(images.validation.labels)))
        some = Split(*(part[at] for part in images.validation))
        weights = jax.tree.map(np.asarray, (params, stats))
        found = glance(network, *weights, some, attack, jax.random.fold_in(key, epoch))
        chosen = choose_examples(found.seen, _DRAWN)
        png = image_grid(some.images, found.seen, chosen, images.class_names, attack.name)
        return Shown(_histograms(found), {"attacked_images": _pixels(png)})

    return show


def _histograms(found: Glance) -> dict[str, np.ndarray]:
    """Of the router's scores by expert, over images and decisions, clean and attacked."""
    scores = {"clean": found.scores, "attacked": found.attacked_scores}
    return {
        f"router_scores/{name}/expert_{expert}": values[..., expert].ravel()
        for name, values in scores.items()
        if values is not None
        for expert in range(values.shape[-1])
    }


def _pixels(png: bytes) -> np.ndarray:
    """The picture uint8 [height, width, 3]."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
