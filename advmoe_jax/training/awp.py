"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, NeurIPS 2020)."""

from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.types import Array, Tree

# Parameters that are no factors of a matrix product, whatever their shape.
_ADDED = ("bias", "scale", "cls", "positions")


def perturbation(params: Tree, gradients: Tree, gamma: float | Array, stacked: Tree) -> Tree:
    """What makes the loss worse most, within a ball about the weights of each layer.

    Wu et al., section 4: min over w of max over ||v_l|| <= gamma ||w_l|| of the loss at w + v. One
    step of theirs from v = 0 is v_l = gamma ||w_l|| g_l / ||g_l||. As in their code, only weights
    of products are moved: no biases, no embeddings, no parameters of normalisations. Each expert's
    kernel is a layer of its own: an expert that no image reaches is not moved, and none takes
    another's share.

    Args:
        params: parameters w.
        gradients: of the loss, at w.
        gamma: relative size; 0.01 in the paper for AT, 0.005 for TRADES.
        stacked: whether a parameter's first axis counts experts, a tree like ``params``.

    Returns:
        v, a tree like ``params``.
    """

    def of_layer(path: tuple[Any, ...], *leaves: Any) -> Array:
        # By name: the biases of attention have an axis for heads, as many as kernels have.
        is_added = jax.tree_util.keystr(path[-1:], simple=True) in _ADDED
        return jnp.zeros_like(leaves[0]) if is_added else _of_layer(*leaves, gamma)

    return jax.tree_util.tree_map_with_path(of_layer, params, gradients, stacked)


def _of_layer(weight: Array, gradient: Array, is_stacked: bool, gamma: float | Array) -> Array:
    axes = tuple(range(int(is_stacked), weight.ndim))
    if len(axes) < 2:
        return jnp.zeros_like(weight)

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))

    scale = gamma * norm(weight) / jnp.maximum(norm(gradient), jnp.finfo(jnp.float32).tiny)
    return (scale * gradient).astype(weight.dtype)
