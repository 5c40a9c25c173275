"""A backbone as blocks one after the other, with exits after some of them.

A stage of a network with K exits, the main one counted, is what lies between one exit and the next:
stage i runs from the features behind exit i - 1 to those behind exit i, and answers at that exit.
"""

from abc import abstractmethod

import flax.nnx as nnx
import jax.numpy as jnp
from jaxtyping import Float, Int

from advmoe_jax.models.layers import Context, Heads, run_layer
from advmoe_jax.models.output import Output, answer_of
from advmoe_jax.types import Array, Labels, Logits, Tree

Features = Float[Array, "batch height width channels"]
NEVER = -1.0  # below every entropy: no image leaves


class Threshold(nnx.BatchStat):
    """Entropies below which images leave, one per side exit; chosen after training.

    They are kept among the statistics: what a network has besides parameters, and is not learned by
    gradients.
    """


class Exits(nnx.Module):
    """The side exits of a backbone.

    Args:
        places: numbers of blocks behind which they are, ascending.
        heads: of each, modules from (features, context) to logits float32 [B, classes].
    """

    def __init__(self, places: tuple[int, ...], heads: list[nnx.Module]) -> None:
        self.places = tuple(places)
        for i, head in enumerate(heads, 1):
            setattr(self, f"exit{i}", head)
        self.thresholds = Threshold(jnp.full(len(places), NEVER, jnp.float32))

    def answer(self, number: int, x: Features, context: Context) -> Logits:
        """What side exit ``number``, from 0, says of the features behind its block."""
        return getattr(self, f"exit{number + 1}")(x, context)


class Trunk(nnx.Module):
    """What every backbone is: ``begin``, some blocks, ``end``.

    By default a block is the layer of its name in ``names``.

    Attributes:
        exits: its side exits, None without.
        names: of the blocks.
        is_pre_activated: whether what is between blocks is neither normalised nor rectified.
    """

    exits: Exits | None = None
    names: tuple[str, ...]
    is_pre_activated = False

    @abstractmethod
    def begin(self, x: Array, context: Context) -> Features:
        """Normalised images -> what the first block reads."""

    def block(self, number: int, x: Features, context: Context) -> Features:
        """Block ``number``, from 0."""
        return run_layer(getattr(self, self.names[number]), x, context)

    @abstractmethod
    def end(self, x: Features, context: Context) -> Logits:
        """What the last block gives -> logits float32 [B, classes]."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.names)

    @property
    def num_exits(self) -> int:
        """How many exits there are, the main one counted."""
        return 1 if self.exits is None else len(self.exits.places) + 1

    def __call__(self, x: Array, context: Context) -> Logits | Heads:
        """Normalised images [B, H, W, C] -> logits float32 [B, classes], or those of all exits."""
        answers = []
        for number in range(self.num_exits):
            x, logits = self.stage(number, x, context)
            answers.append(logits)
        return answers[0] if self.exits is None else Heads(answers[-1], tuple(answers))

    def stage(
        self, number: int, x: Array, context: Context, *, answers: bool = True
    ) -> tuple[Features, Logits | None]:
        """One stage.

        Args:
            number: of the stage, from 0.
            x: features behind the exit before; normalised images in stage 0.
            context: of the pass.
            answers: whether the side exit's head runs; the last stage always answers.

        Returns:
            The features behind the stage, and the exit's logits.
        """
        places = (0, *(self.exits.places if self.exits else ()), self.num_blocks)
        x = self.begin(x, context) if number == 0 else x
        for i in range(places[number], places[number + 1]):
            x = self.block(i, x, context)
        if number == self.num_exits - 1:
            return x, self.end(x, context)
        return x, self.exits.answer(number, x, context) if answers else None


def entropy(logits: Float[Array, "*any classes"]) -> Float[Array, "*any"]:
    """-sum p ln(p + 1e-5) of p = softmax(logits), float32, in nats, as RDI-Nets has it.

    From -1e-5, for an image that an exit is sure of, to about ln(classes). Hu et al., "Triple wins:
    boosting accuracy, robustness and efficiency together by enabling input-adaptive inference",
    ICLR 2020.
    """
    probabilities = nnx.softmax(logits.astype(jnp.float32))
    return -jnp.sum(probabilities * jnp.log(probabilities + 1e-5), axis=-1)


def first_exit(
    entropies: Float[Array, "batch side_exits"], thresholds: Float[Array, " side_exits"]
) -> Int[Array, " batch"]:
    """The exit that images leave at: the first whose entropy is below its threshold.

    Exits are counted from 0; an image that no side exit is sure of leaves at the main one.
    """
    leaves = entropies < thresholds
    side_exits = entropies.shape[-1]
    return jnp.where(jnp.any(leaves, -1), jnp.argmax(leaves, -1), side_exits).astype(jnp.int32)


def predictions(output: Output, stats: Tree) -> Labels:
    """What a network answers, int32 [B]: of several exits, the one that each image leaves at."""
    if output.exits is None:
        return answer_of(output.logits)
    answers = jnp.stack(output.exits, axis=1)
    taken = first_exit(entropy(answers[:, :-1]), thresholds_of(stats))
    return jnp.take_along_axis(answer_of(answers), taken[:, None], axis=1)[:, 0]


def thresholds_of(stats: Tree) -> Float[Array, " side_exits"]:
    """The thresholds of the side exits, out of a network's statistics."""
    return stats["exits"]["exits"]["thresholds"]


def with_thresholds(stats: Tree, thresholds: Float[Array, " side_exits"]) -> Tree:
    """A network's statistics with other thresholds."""
    values = jnp.asarray(thresholds, jnp.float32)
    own = {**stats["exits"]["exits"], "thresholds": values}
    return {**stats, "exits": {**stats["exits"], "exits": own}}
