"""What keeps experts from starving: balancing losses, noise on scores, random routes, shared steps.

A router that prefers one expert trains that expert alone, and prefers it the more. Four remedies,
each off unless asked for:

- **Losses** that are least when a batch is spread evenly over the experts. They are computed from
  the scores ``s`` without noise, over the whole batch of all devices (of a microbatch, where there
  are several) and over all tokens, where tokens decide, and averaged over the layers (V-MoE's
  published code adds them up, and takes groups of 8 images). With p = softmax(s):

  ==============  ==============================================================================
  ``importance``  CV^2 of I_e = mean p_e over the images (Shazeer et al., 2017, eq. 6 and 7)
  ``load``        CV^2 of the expected number of images: P(s_e + noise >= the k-th largest noisy
                  score), a smooth function of s (Shazeer et al., appendix A, in the form of V-MoE,
                  Riquelme et al., 2021, appendix A)
  ``switch``      N sum_e f_e I_e, f_e the share of choices that fall on e; 1 if even (Fedus et
                  al., 2021, eq. 4 to 6)
  ``entropy``     log N - H(I): the images together use all experts, while one image may be
                  decided (LIMoE's global entropy loss, Mustafa et al., 2022)
  ==============  ==============================================================================

- **Noise**: sigma N(0, 1) is added to the scores when experts are chosen in training (Shazeer et
  al., eq. 4; V-MoE's sigma is 1/N), so that a close decision now and then goes the other way.
- **Warm-up**: for the first steps every route is drawn uniformly at random, in updates and in
  attacks alike. The experts hence learn from all images before any can starve, and the router,
  which is trained meanwhile, sees what every expert makes of them; it is followed afterwards. (To
  train the router first would not help: among untrained experts there is nothing to learn but the
  preference that is the trouble.)
- **Random routes** for a share of the images of every step, drawn anew in each: every pathway keeps
  learning from all images, attacked along that pathway, and none breaks when an attacker moves an
  image to it.
- **Shared steps**: an expert sees a part of the images, and learns from these alone what all
  images have in common. With gradients g_e, expert e takes its step along g_e + s sum_{j != e} g_j.
  That is gradient descent on kernels W_e = C + D_e, C common to all experts, D_e an expert's own,
  with s and 1 - s times the learning rate: at s = 0 experts have nothing in common, at s = 1 they
  all take the step that one network of all images would. Experts that start as one
  (``start.equal_experts``) then grow apart by what their own images ask for.

Noise and random routes are drawn once per image and step and shared by the clean and the attacked
pass: the attacker faces a fixed function, and what changes a route is the perturbation alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.errors import UserError
from advmoe_jax.routing import measures
from advmoe_jax.routing.choice import Routing
from advmoe_jax.types import Array, Axes, Tree

# So large beside any finite score that the largest sum is uniformly random.
_RANDOM = 1e9


class Balance(NamedTuple):
    """Weights of the losses, standard deviation of the noise, length of the warm-up.

    Attributes:
        importance: weight.
        load: weight; needs noise.
        switch: weight.
        entropy: weight.
        noise: sigma, in units of the scores.
        warmup_steps: steps with random routes.
        random_share: share of the images whose routes are random in every step.
        shared_steps: share of the other experts' gradients in an expert's step, in [0, 1].
    """

    importance: float = 0.0
    load: float = 0.0
    switch: float = 0.0
    entropy: float = 0.0
    noise: float = 0.0
    warmup_steps: int = 0
    random_share: float = 0.0
    shared_steps: float = 0.0

    @property
    def has_loss(self) -> bool:
        """Whether any loss has a weight."""
        return any((self.importance, self.load, self.switch, self.entropy))

    @property
    def is_random(self) -> bool:
        """Whether routes are ever random."""
        return bool(self.noise or self.warmup_steps or self.random_share)


class Noise(NamedTuple):
    """Randomness of one step's routes, float32 [B, D, N] each.

    Attributes:
        added: what is added to the scores before experts are chosen.
        normal: the N(0, 1) that it is a multiple of.
    """

    added: Array
    normal: Array


def check(balance: Balance, gate: str) -> None:
    """Raises UserError if the settings contradict each other, or the network's gate."""
    if (balance.warmup_steps or balance.random_share) and gate == "noisy_softmax":
        name = "warmup_epochs" if balance.warmup_steps else "random_share"
        raise UserError(
            f"balance.{name} draws routes by noise, which model.gate='noisy_softmax' would "
            "weigh experts by: set it to 0, or model.gate='softmax'"
        )
    if balance.load and not balance.noise:
        raise UserError(
            "balance.load needs score noise, over which it is an expectation: set balance.noise, "
            "to 1/num_experts say, or balance.load=0"
        )


def draw(balance: Balance, keys: Array, step: Array, shape: tuple[int, ...]) -> Noise:
    """One step's noise.

    Args:
        balance: the settings.
        keys: one PRNG key per image [B].
        step: completed steps.
        shape: of one image's scores, (D, N).
    """
    normal = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    is_random = step < balance.warmup_steps
    if balance.random_share:
        drawn = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
        is_random |= (drawn < balance.random_share).reshape(-1, *(1 for _ in shape))
    scale = jnp.where(is_random, _RANDOM, balance.noise)
    return Noise(scale * normal, normal)


def share_steps(
    gradients: Tree, stacked: Tree, share: float, axis_name: Axes | None = None
) -> Tree:
    """g_e -> g_e + share * sum_{j != e} g_j, of parameters whose first axis counts the experts.

    Args:
        gradients: of some parameters.
        stacked: whether a parameter's first axis counts experts, a tree like ``gradients``.
        share: in [0, 1].
        axis_name: mapped axis over which the experts are spread, if any.
    """

    def of_layer(gradient: Array, is_stacked: bool) -> Array:
        if not is_stacked:
            return gradient
        total = jnp.sum(gradient, axis=0, keepdims=True)
        total = total if axis_name is None else lax.psum(total, axis_name)
        return (1 - share) * gradient + share * total

    return jax.tree.map(of_layer, gradients, stacked)


def with_equal_experts(params: Tree, stacked: Tree) -> Tree:
    """The parameters, with every expert of a layer as its first one is.

    Args:
        params: of a network.
        stacked: whether a parameter's first axis counts experts, a tree like ``params``.
    """

    def of_layer(weight: Array, is_stacked: bool) -> Array:
        return jnp.broadcast_to(weight[:1], weight.shape) if is_stacked else weight

    return jax.tree.map(of_layer, params, stacked)


def balancing_loss(
    balance: Balance,
    routing: Routing,
    noise: Noise | None,
    axis_name: Axes | None = None,
    routers: int | None = None,
) -> Array:
    """The weighted sum of the losses, a scalar.

    Args:
        balance: the weights.
        routing: of a batch; its scores are without noise.
        noise: what routes were chosen with.
        axis_name: mapped axis over which the batch is spread, if any.
        routers: number of layers that are routed by themselves; None: one for each decision.
    """

    def of_layers(x: Array) -> Array:
        return measures.of_layers(x, routers)

    scores, indices, top_k = of_layers(routing.scores), routing.indices, routing.indices.shape[-1]
    probabilities = jax.nn.softmax(scores)
    share = _batch_mean(probabilities, axis_name)
    losses = []
    if balance.importance:
        losses.append(balance.importance * squared_variation(share))
    if balance.load:
        normal = of_layers(noise.normal)
        smooth = load_probabilities(scores, balance.noise * normal, balance.noise, top_k)
        losses.append(balance.load * squared_variation(_batch_mean(smooth, axis_name)))
    if balance.switch:
        chosen = jnp.mean(jax.nn.one_hot(of_layers(indices), scores.shape[-1]), axis=-2)
        losses.append(balance.switch * switch_loss(_batch_mean(chosen, axis_name), share))
    if balance.entropy:
        losses.append(balance.entropy * missing_entropy(share))
    return sum(jnp.mean(loss) for loss in losses)


def squared_variation(amounts: Array) -> Array:
    """CV^2, variance over squared mean, of amounts [..., N] (Shazeer et al., 2017, eq. 7)."""
    return jnp.var(amounts, axis=-1) / jnp.square(jnp.mean(amounts, axis=-1))


def load_probabilities(scores: Array, noise: Array, sigma: float, top_k: int) -> Array:
    """How likely each expert is to be chosen if its own noise were drawn again, float32 [..., N].

    V-MoE, appendix A: 1 - Phi((t - s_e) / sigma), t the k-th largest of the noisy scores.

    Args:
        scores: without noise, float32 [..., N].
        noise: that was added, the same shape.
        sigma: its standard deviation, positive.
        top_k: choices per image.
    """
    threshold = lax.top_k(scores + noise, top_k)[0][..., -1:]
    return jax.scipy.stats.norm.cdf((scores - threshold) / sigma)


def switch_loss(chosen: Array, importance: Array) -> Array:
    """N sum_e f_e I_e over experts [..., N]; f is counted, so the gradient goes through I alone."""
    products = lax.stop_gradient(chosen) * importance
    return chosen.shape[-1] * jnp.sum(products, axis=-1)


def missing_entropy(importance: Array) -> Array:
    """log N - H(I) >= 0, in nats, over experts [..., N]."""
    log = jnp.log(jnp.maximum(importance, jnp.finfo(jnp.float32).tiny))
    return jnp.log(importance.shape[-1]) + jnp.sum(importance * log, axis=-1)


def _batch_mean(x: Array, axis_name: Axes | None) -> Array:
    mean = jnp.mean(x, axis=0)
    return mean if axis_name is None else lax.pmean(mean, axis_name)
