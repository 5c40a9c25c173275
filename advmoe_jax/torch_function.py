"""A PyTorch model as a JAX function, so that everything that takes a function takes it.

Every call leaves JAX and runs PyTorch on the host: slow, and exact. Its gradient is that of
PyTorch's autograd.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from advmoe_jax.types import Array, Images, Logits

if TYPE_CHECKING:
    import torch


def from_torch(model: "torch.nn.Module") -> Callable[[Images], Logits]:
    """A PyTorch classifier as a function that JAX can differentiate, compile and attack.

    The model takes float32 images NCHW, as is PyTorch's custom, and gives logits [B, K]; the
    function takes the same images NHWC, as is JAX's. Images go to the device of the model's
    parameters. The model is looked at anew at every call: what its parameters are then counts, also
    inside of what was compiled before.

    Args:
        model: in inference mode (``model.eval()``), with normalisation inside, so that images lie
            in [0, 1].

    Raises:
        ValueError: if the model is in training mode; when called, if it does not give logits.
    """
    import torch

    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")

    def parameters_device() -> "torch.device":
        first = next(iter(model.parameters()), None)
        return torch.device("cpu") if first is None else first.device

    def as_tensor(images: Array) -> "torch.Tensor":
        array = np.array(images, np.float32)  # a copy, which PyTorch may write to
        return torch.from_numpy(array).to(parameters_device()).permute(0, 3, 1, 2).contiguous()

    def classify(images: Array) -> np.ndarray:
        with torch.no_grad():
            return model(as_tensor(images)).float().cpu().numpy()

    def pull_back(images: Array, weights: Array) -> np.ndarray:
        with torch.enable_grad():
            tensor = as_tensor(images).requires_grad_()
            logits = model(tensor)
            cotangent = torch.from_numpy(np.array(weights)).to(logits)
            (gradient,) = torch.autograd.grad(logits, tensor, cotangent)
        return gradient.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def shape_of(images: Images) -> jax.ShapeDtypeStruct:
        """Of the logits: the model is asked, with one black image."""
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype} {images.shape}: give float32 [n, height, width, "
                "channels] in [0, 1]"
            )
        one = classify(np.zeros((1, *images.shape[1:]), np.float32))
        if one.ndim != 2 or len(one) != 1:
            raise ValueError(
                f"the model gives {one.shape} for one image: it must give logits [1, K]"
            )
        return jax.ShapeDtypeStruct((images.shape[0], one.shape[1]), jnp.float32)

    @jax.custom_vjp
    def function(images: Images) -> Float[Array, "batch classes"]:
        shape = shape_of(images)
        return jax.pure_callback(classify, shape, images, vmap_method="sequential")

    def forward(images: Images) -> tuple[Logits, Images]:
        return function(images), images

    def backward(images: Images, weights: Logits) -> tuple[Images]:
        shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
        gradient = jax.pure_callback(pull_back, shape, images, weights, vmap_method="sequential")
        return (gradient.astype(images.dtype),)

    function.defvjp(forward, backward)
    return function
