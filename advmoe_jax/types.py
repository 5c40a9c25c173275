"""Names for what functions pass to each other; shapes are written as jaxtyping writes them."""

from typing import Any

import jax
from jaxtyping import Float, Int

Array = jax.Array
# Names of the mesh axes that a batch is spread over.
Axes = str | tuple[str, ...]
# A nested dict of arrays: parameters, statistics, metrics.
Tree = dict[str, Any]

# float32 in [0, 1], NHWC.
Images = Float[Array, "batch height width channels"]
Logits = Float[Array, "batch classes"]
Labels = Int[Array, " batch"]
