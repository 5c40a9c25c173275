"""VGG networks (Simonyan and Zisserman, 2015), dense and MoE by the same code.

In the MoE form every convolution but the first is one kernel per expert. Convolutions have no bias;
the classifier is three linear layers on a 2x2 average pool.
"""

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.models.layers import BatchNorm, Context, Conv, Linear, run_layer
from advmoe_jax.models.moe import conv_factory
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array

# Convolutions per stage; stages are 1, 2, 4, 8 and 8 times as wide as the first, and a 2x2 max
# pool stands between one stage and the next.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
HIDDEN = 256


class VGG(Trunk):
    """VGG-11, 13 or 16. A block is a convolution, with the pool in front of it if there is one.

    Args:
        depth: one of ``DEPTHS``.
        batch_norm: normalise after every convolution.
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: kernels per convolution; 1 is the dense network.
        ratio: scales every width of the convolutions.
        width: channels of the first stage at ratio 1 (published: 64).
        dtype: of compute in the convolutions; the classifier is float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    first = "conv1_0"  # the convolution that reads the image

    def __init__(
        self,
        depth: int,
        batch_norm: bool,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int,
        ratio: float,
        width: int = 64,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.batch_norm = batch_norm
        channels, names = in_channels, []
        for stage, count in enumerate(DEPTHS[depth]):
            planes = int(width * min(2**stage, 8) * ratio)
            for i in range(count):
                conv = Conv if stage == i == 0 else conv_factory(num_experts)
                names.append(f"{stage + 1}_{i}")
                setattr(self, f"conv{names[-1]}", conv(channels, planes, 3, 1, 1, **types))
                if batch_norm:
                    setattr(self, f"bn{names[-1]}", BatchNorm(planes, param_dtype=param_dtype))
                channels = planes
        self.names = tuple(names)
        linear = {"param_dtype": param_dtype, "rngs": rngs}
        self.hidden1 = Linear(4 * channels, HIDDEN, **linear)
        self.hidden2 = Linear(HIDDEN, HIDDEN, **linear)
        self.head = Linear(HIDDEN, num_classes, **linear)

    @staticmethod
    def count_blocks(depth: int, batch_norm: bool = False) -> int:
        """How many convolutions a VGG of that depth has."""
        return sum(DEPTHS[depth])

    def begin(self, x: Array, context: Context) -> Array:
        """The images, with height and width of at least 16, as they are."""
        return x

    def block(self, number: int, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        name = self.names[number]
        if name.endswith("_0") and number > 0:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = run_layer(getattr(self, f"conv{name}"), x, context)
        if self.batch_norm:
            x = run_layer(getattr(self, f"bn{name}"), x, context)
        return jax.nn.relu(x)

    def end(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = _pool_to_2x2(x.astype(jnp.float32))
        x = jax.nn.relu(self.hidden1(x.reshape(x.shape[0], -1)))
        return self.head(jax.nn.relu(self.hidden2(x)))


def _pool_to_2x2(x: Array) -> Array:
    """Mean over the four quadrants, which share the middle row or column of an odd size."""
    rows, columns = (((0, -(-n // 2)), (n // 2, n)) for n in x.shape[1:3])
    means = [[jnp.mean(x[:, a:b, c:d], axis=(1, 2)) for c, d in columns] for a, b in rows]
    return jnp.stack([jnp.stack(row, axis=1) for row in means], axis=1)
