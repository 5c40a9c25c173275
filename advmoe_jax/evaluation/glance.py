"""A quick look at a network in training: some images attacked once, and what its router thinks."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from advmoe_jax.data.augment import to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation.explanation import Seen
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import predictions
from advmoe_jax.types import Array, Images, Labels, Tree


class Glance(NamedTuple):
    """What was seen of n images.

    Attributes:
        seen: the answers; nothing along other routes.
        scores: of the router for the clean images; None without a router.
        attacked_scores: for the attacked ones, likewise.
    """

    seen: Seen
    scores: Float[np.ndarray, "n decisions experts"] | None
    attacked_scores: Float[np.ndarray, "n decisions experts"] | None


def glance(
    network: Network, params: Tree, stats: Tree, split: Split, attack: NamedAttack, key: Array
) -> Glance:
    """Attacks all images of a split at once, which is to be small.

    Args:
        network: the functional network.
        params: its parameters.
        stats: its statistics.
        split: the images, uint8.
        attack: on the whole network, in one program.
        key: image ``i`` draws from ``fold_in(key, i)``.
    """
    images, labels = to_float(jnp.asarray(split.images)), jnp.asarray(split.labels)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(labels)))
    answers = _glance(network, params, stats, images, labels, keys, attack=attack)
    answers = {name: np.asarray(value) for name, value in answers.items()}
    scores, attacked_scores = (answers.pop(x, None) for x in ("scores", "attacked_scores"))
    return Glance(Seen(labels=split.labels, **answers), scores, attacked_scores)


@partial(jax.jit, static_argnames="attack")
def _glance(
    network: Network,
    params: Tree,
    stats: Tree,
    images: Images,
    labels: Labels,
    keys: Array,
    *,
    attack: NamedAttack,
) -> dict[str, Array]:
    adversarial = attack.perturb(network, params, stats, images, labels, keys)
    answers = {"adversarial": adversarial}
    # The names of ``Seen``'s fields.
    for batch, name, before in ((images, "clean", ""), (adversarial, "attacked", "attacked_")):
        output = network.apply(params, stats, batch)[0]
        answers[name] = predictions(output, stats)
        if output.routing is not None:
            answers[f"{before}routes"] = output.routing.indices
            answers[f"{before}scores"] = output.routing.scores
    return answers
