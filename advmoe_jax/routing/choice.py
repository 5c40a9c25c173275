"""What a router decides: the experts chosen, their weights, and the scores they were chosen by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from advmoe_jax.errors import UserError
from advmoe_jax.types import Array

GATES = ("straight_through", "softmax")


class Routing(NamedTuple):
    """What was chosen for every image, decision by decision.

    A network names its decisions (``Network.decisions``): one for the whole image, one for each
    layer, or one for each layer and token. N is the number of experts, k that of the chosen.

    Attributes:
        indices: int32, the chosen experts, best first.
        weights: float32, what the output of each is multiplied by.
        scores: float32, the scores of all experts, before any softmax and without noise.
    """

    indices: Int[Array, "batch decisions k"]
    weights: Float[Array, "batch decisions k"]
    scores: Float[Array, "batch decisions experts"]


def choose(
    scores: Float[Array, "*any experts"],
    top_k: int = 1,
    gate: str = "straight_through",
    surrogate: bool = True,
    noise: Float[Array, "*any experts"] | None = None,
) -> Routing:
    """Top-k of the scores, and the weights of the chosen; the leading axes stay as they are.

    Args:
        scores: computed with in float32.
        top_k: experts per decision, 1 <= top_k <= N.
        gate: ``straight_through``: weight 1 forward, and backward the gradient of the weight goes
            to the chosen expert's score unchanged; ``softmax``: the probabilities of the chosen.
        surrogate: whether ``straight_through`` has that backward pass; without it the weight has
            its true derivative, zero.
        noise: added when experts are chosen, and to nothing else; None: none.

    Raises:
        UserError: if ``top_k`` or ``gate`` is not valid.
    """
    num_experts = scores.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise UserError(f"model.top_k={top_k} must lie between 1 and num_experts={num_experts}")
    if gate not in GATES:
        raise UserError(f"model.gate={gate!r} is unknown; choose one of {', '.join(GATES)}")
    scores = scores.astype(jnp.float32)
    indices = lax.top_k(scores if noise is None else scores + noise, top_k)[1]
    if gate == "softmax":
        weights = jnp.take_along_axis(jax.nn.softmax(scores), indices, axis=-1)
    elif surrogate:
        chosen = jnp.take_along_axis(scores, indices, axis=-1)
        weights = 1.0 + (chosen - lax.stop_gradient(chosen))
    else:
        weights = jnp.ones(indices.shape, jnp.float32)
    return Routing(indices.astype(jnp.int32), weights, scores)


def follow(
    indices: Int[Array, "batch decisions k"],
    scores: Float[Array, "batch decisions experts"],
    gate: str,
) -> Routing:
    """The routing that takes given experts, each weighted as the gate would weigh it.

    Args:
        indices: the experts to take.
        scores: the router's; the ``softmax`` gate's weights come from them.
        gate: one of ``GATES``.
    """
    weights = jnp.ones(indices.shape, jnp.float32)
    if gate == "softmax":
        weights = jnp.take_along_axis(jax.nn.softmax(scores), indices, axis=-1)
    return Routing(indices, weights, scores)
