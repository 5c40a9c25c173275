"""SmallCNN: the network of RDI-Nets for MNIST (Hu et al., ICLR 2020; Zhang et al., ICML 2019).

Four 3x3 convolutions without padding or normalisation, three linear layers; dense alone.
"""

from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp

from advmoe_jax.errors import UserError
from advmoe_jax.models.dense_layers import BiasedConv, Dropout, max_pool
from advmoe_jax.models.layers import Context, Linear
from advmoe_jax.models.trunk import Trunk
from advmoe_jax.types import Array

SIZE = 28  # height and width of the images: the linear layers read whole feature maps
HIDDEN = 200
DROPOUT = 0.5


class SmallCNN(Trunk):
    """Four blocks, each a convolution and a ReLU, with a pool behind the second and the fourth.

    The last linear layer starts at zero, others as PyTorch's do.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        num_experts: must be 1.
        ratio: must be 1.
        dtype: of compute in the convolutions; linear layers are float32.
        param_dtype: of the parameters.
        rngs: where initial parameters come from.
    """

    first = "conv1"  # the convolution that reads the image
    is_dense_alone = True
    is_of_one_width = True
    exit_places = (1, 3)
    image_size = SIZE

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        num_experts: int = 1,
        ratio: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        channels = in_channels
        for i, planes in enumerate((32, 32, 64, 64), 1):
            setattr(self, f"conv{i}", BiasedConv(channels, planes, 3, **types))
            channels = planes
        self.names = ("conv1", "conv2", "conv3", "conv4")
        linear = {"uniform": True, "param_dtype": param_dtype, "rngs": rngs}
        self.hidden1 = Linear(4 * 4 * channels, HIDDEN, **linear)
        self.dropout = Dropout(DROPOUT, 0)
        self.hidden2 = Linear(HIDDEN, HIDDEN, **linear)
        self.head = Linear(HIDDEN, num_classes, **linear)
        self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])
        self.head.bias[...] = jnp.zeros_like(self.head.bias[...])

    @staticmethod
    def count_blocks() -> int:
        """How many blocks there are."""
        return 4

    def begin(self, x: Array, context: Context) -> Array:
        """The images as they are.

        Raises:
            UserError: if they are not of 28x28.
        """
        if x.shape[1:3] != (SIZE, SIZE):
            raise UserError(
                f"model.name='small_cnn' is for images of {SIZE}x{SIZE}, not of "
                f"{x.shape[1]}x{x.shape[2]}: choose another network"
            )
        return x

    def block(self, number: int, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = jax.nn.relu(super().block(number, x, context))
        return max_pool(x) if number in (1, 3) else x

    def end(self, x: Array, context: Context) -> Array:
        """See ``Trunk``."""
        x = jax.nn.relu(self.hidden1(x.reshape(x.shape[0], -1)))
        return self.head(jax.nn.relu(self.hidden2(self.dropout(x, context))))

    @staticmethod
    def exit_head(
        channels: int, num_classes: int, *, place: int, halvings: int, **types: Any
    ) -> nnx.Module:
        """The head of the exit behind block 1 or 3."""
        return SmallHead(place, channels, num_classes, **types)


class SmallHead(nnx.Module):
    """A pool and three linear layers, with a convolution in front at the first exit.

    There is no activation in it: at inference it is an affine map of the features' maxima.
    """

    def __init__(
        self,
        place: int,
        channels: int,
        num_classes: int,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.has_conv = place == 1
        features = 5 * 5 * channels
        if self.has_conv:
            types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            self.conv = BiasedConv(channels, 16, 3, 2, **types)
            features = 6 * 6 * 16
        linear = {"uniform": True, "param_dtype": param_dtype, "rngs": rngs}
        self.hidden1 = Linear(features, HIDDEN, **linear)
        self.dropout = Dropout(DROPOUT, place)
        self.hidden2 = Linear(HIDDEN, HIDDEN, **linear)
        self.head = Linear(HIDDEN, num_classes, **linear)

    def __call__(self, x: Array, context: Context) -> Array:
        """Features -> logits float32 [B, classes]."""
        x = self.conv(x, context) if self.has_conv else x
        x = max_pool(x)
        x = self.hidden1(x.reshape(x.shape[0], -1))
        return self.head(self.hidden2(self.dropout(x, context)))
