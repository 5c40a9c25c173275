"""APGD whose loss is of one thing, and whose success is judged by another: the network itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float

from advmoe_jax.attacks.apgd import apgd_steps
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.losses import Loss
from advmoe_jax.attacks.stepwise import Batch, Stepwise
from advmoe_jax.types import Array, Labels, Logits


class Judged(NamedTuple):
    """What one step of an attack looks at; two trees of arrays with the image as first axis.

    Attributes:
        outputs: what the attack's loss is of.
        judge: the network's own logits.
    """

    outputs: Any
    judge: Logits


View = Callable[[Any, Batch], Callable[..., Judged]]


def judged_steps(
    threat: Threat,
    view: View,
    value: Callable[[Any, Labels], Float[Array, " batch"]],
    *,
    look: Callable[[Any, Array], Any],
    **settings: Any,
) -> Stepwise:
    """APGD on another loss than the network's, of points that the network itself judges.

    Args:
        threat: the ball and the pixel range.
        view: (function, batch) -> what a step looks at, a function of images, and of keys if
            ``eot_samples`` is set.
        value: (outputs, labels) -> what is maximised.
        look: see ``Stepwise``; it is ``batch.clean`` of the view.
        **settings: of ``apgd_steps``.
    """

    def of_outputs(shown: Judged, labels: Labels) -> Float[Array, " batch"]:
        return value(shown.outputs, labels)

    def fooled(shown: Judged, labels: Labels) -> Array:
        return jnp.argmax(shown.judge, axis=-1) != labels

    inner = apgd_steps(threat, loss=Loss(of_outputs, fooled), **settings)

    def step(function: Any, batch: Batch, state: Any) -> Any:
        return inner.step(view(function, batch), batch, state)

    identity = (*inner.identity, view.__qualname__, value.__qualname__)
    return inner._replace(step=step, look=look, identity=identity)
