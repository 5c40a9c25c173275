"""Sparse networks: every convolution reads the best of its input channels only.

Structured pruning with learned scores, after HYDRA (Sehwag et al., NeurIPS 2020): the kernels of a
trained dense network are frozen while scores are learned through the loss, the channels with the
largest scores stay, and the kernels are trained on. HYDRA prunes single weights, which saves no
time on any device; here whole input channels go, as in He et al. (ICCV 2017), and a convolution of
``k`` kept channels out of ``C`` costs ``k / C`` of the dense one. All convolutions but the first
are pruned to the same share.
"""

import flax.nnx as nnx
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from advmoe_jax.types import Array, Tree


class ChannelScore(nnx.Param):
    """Scores of a convolution's input channels, float32 [C_in]; ``keep`` of them are read."""


def scores_of(kernels: Tree, scores: Tree) -> Tree:
    """Scores in proportion to the norms of the kernels' input channels, the largest 1.

    HYDRA's initialisation (section 3): learning starts from pruning by magnitude.

    Args:
        kernels: the parameters of the backbone.
        scores: the tree to fill, ``scores`` [C_in] beside the ``kernel`` of each convolution.
    """
    flat = traverse_util.flatten_dict(kernels)
    filled = {}
    for path in traverse_util.flatten_dict(scores):
        squares = jnp.square(flat[(*path[:-1], "kernel")].astype(jnp.float32))
        norms = jnp.sqrt(jnp.sum(squares, axis=(0, 1, 3)))
        filled[path] = norms / jnp.maximum(jnp.max(norms), jnp.finfo(jnp.float32).tiny)
    return traverse_util.unflatten_dict(filled)


def kept_channels(scores: Array, keep: int) -> Array:
    """The ``keep`` channels with the largest scores, int32 [keep], in ascending order."""
    return jnp.sort(lax.top_k(scores, keep)[1])


def channel_mask(scores: Array, keep: int) -> Array:
    """1 for the channels kept and 0 for others, [C]; its gradient goes straight to the scores."""
    hard = jnp.zeros_like(scores).at[kept_channels(scores, keep)].set(1.0)
    return lax.stop_gradient(hard - scores) + scores


def select(x: Array, kernel: Array, scores: Array, keep: int) -> tuple[Array, Array]:
    """The channels kept of images [B, H, W, C] and of a kernel [kh, kw, C, C_out]."""
    kept = kept_channels(scores, keep)
    return x[..., kept], kernel[:, :, kept]


def prune(backbone: nnx.Module, keep: float) -> None:
    """Prunes every convolution but the first, which reads the image, to a share of its channels.

    Args:
        backbone: names its first convolution in its attribute ``first``.
        keep: the share, in (0, 1].
    """
    for path, node in list(nnx.iter_graph(backbone)):
        if hasattr(node, "prune") and path != (backbone.first,):
            node.prune(keep)
