"""What a router decides: the experts chosen, their weights, and the scores they were chosen by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from advmoe_jax.errors import UserError
from advmoe_jax.types import Array

GATES = ("straight_through", "softmax", "noisy_softmax")


class Routing(NamedTuple):
    """What was chosen for every image, decision by decision.

    A network names its decisions (``Network.decisions``): one for the whole image, one for each
    layer, or one for each layer and token. N is the number of experts, k that of the chosen.

    A network can be told to follow one: as it is, or its ``indices`` alone, weighed as the gate
    weighs them where the image passes.

    Attributes:
        indices: int32, the chosen experts, best first.
        weights: float32, what the output of each is multiplied by; 0 for a choice that was dropped.
        scores: float32, the scores of all experts, before any softmax and without noise.
    """

    indices: Int[Array, "batch decisions k"]
    weights: Float[Array, "batch decisions k"] | None = None
    scores: Float[Array, "batch decisions experts"] | None = None


def choose(
    scores: Float[Array, "*any experts"],
    top_k: int = 1,
    gate: str = "straight_through",
    surrogate: bool = True,
    noise: Float[Array, "*any experts"] | None = None,
    indices: Int[Array, "*any k"] | None = None,
) -> Routing:
    """Top-k of the scores, and the weights of the chosen; the leading axes stay as they are.

    Args:
        scores: computed with in float32.
        top_k: experts per decision, 1 <= top_k <= N.
        gate: ``straight_through``: weight 1 forward, and backward the gradient of the weight goes
            to the chosen expert's score unchanged; ``softmax``: the probabilities of the chosen,
            of all experts' and not normalised again; ``noisy_softmax``: the same of the noisy
            scores (Riquelme et al., 2021, eq. 1).
        surrogate: whether ``straight_through`` has that backward pass; without it the weight has
            its true derivative, zero.
        noise: added when experts are chosen, and, by ``noisy_softmax``, when they are weighed;
            None: none.
        indices: the experts to take, any number of them, instead of the best.

    Raises:
        UserError: if ``top_k`` or ``gate`` is not valid.
    """
    num_experts = scores.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise UserError(f"model.top_k={top_k} must lie between 1 and num_experts={num_experts}")
    if gate not in GATES:
        raise UserError(f"model.gate={gate!r} is unknown; choose one of {', '.join(GATES)}")
    scores = scores.astype(jnp.float32)
    noisy = scores if noise is None else scores + noise
    if indices is None:
        indices = lax.top_k(noisy, top_k)[1]
    if gate != "straight_through":
        weighed = noisy if gate == "noisy_softmax" else scores
        weights = jnp.take_along_axis(jax.nn.softmax(weighed), indices, axis=-1)
    elif surrogate:
        chosen = jnp.take_along_axis(scores, indices, axis=-1)
        weights = 1.0 + (chosen - lax.stop_gradient(chosen))
    else:
        weights = jnp.ones(indices.shape, jnp.float32)
    return Routing(indices.astype(jnp.int32), weights, scores)
