"""The attacks an evaluation can name.

``clean``, ``fgsm``, ``pgd<N>``; ``ste_pgd<N>``; ``router``, ``router_kl``.

``ste_pgd<N>`` follows the gradient that a straight-through gate pretends to have, as the published
evaluation does. It is there for comparison: that gradient is not the loss's, and PGD on it finds
less.

``router`` and ``router_kl`` perturb images so that the router errs, and do not look at the
classifier: the published evaluation's ``CE(r(x'), y mod N)``, and ``KL(r(x) || r(x'))``.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from advmoe_jax.attacks import Attack, fgsm, make_threat, pgd
from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network

Array = jax.Array
Tree = dict[str, Any]
ROUTER_STEPS = 20


class NamedAttack(NamedTuple):
    """An attack on a whole network.

    Attributes:
        name: as the user wrote it.
        settings: what stands beside its numbers: norm, epsilon, steps, ... ({} for ``clean``).
        perturb: (network, params, stats, images, labels, keys [B]) -> images.
    """

    name: str
    settings: dict[str, Any]
    perturb: Callable[[Network, Tree, Tree, Array, Array, Array], Array]


def parse_attacks(names: str, config: ConfigDict, is_moe: bool) -> list[NamedAttack]:
    """The attacks of a comma-separated list, ``clean`` first whether named or not.

    Args:
        names: such as ``clean,fgsm,pgd20,pgd50,router``.
        config: the whole config; ``attack.norm`` and ``attack.epsilon`` are the threat model,
            ``evaluation.step_size`` and ``evaluation.restarts`` the rest.
        is_moe: whether the network has a router.

    Raises:
        UserError: if a name is unknown, or attacks a router that is not there.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unique = list(dict.fromkeys(["clean", *wanted]))
    return [named_attack(name, config, is_moe) for name in unique]


def named_attack(name: str, config: ConfigDict, is_moe: bool) -> NamedAttack:
    """One attack by name; see ``parse_attacks``."""
    if name == "clean":
        return NamedAttack(name, {}, lambda network, params, stats, images, labels, keys: images)
    try:
        threat = make_threat(config.attack.norm, config.attack.epsilon)
        step_size, restarts = config.evaluation.step_size, config.evaluation.restarts
        settings = {"norm": threat.norm, "epsilon": threat.epsilon}
        if name == "fgsm":
            settings |= {"num_steps": 1, "step_size": threat.epsilon, "restarts": 1}
            return NamedAttack(name, settings, _on_logits(fgsm(threat)))
        steps = {"router": ROUTER_STEPS, "router_kl": ROUTER_STEPS}.get(name)
        if match := re.fullmatch(r"(?:ste_)?pgd([1-9]\d{0,5})", name):
            steps = int(match[1])
        if steps is None:
            raise UserError(
                f"attack {name!r} is unknown; choose from clean, fgsm, pgd<steps> such as pgd20, "
                "ste_pgd<steps>, router, router_kl"
            )
        settings |= {"num_steps": steps, "step_size": step_size, "restarts": restarts}
        loss = "kl" if name == "router_kl" else "cross_entropy"
        attack = pgd(threat, num_steps=steps, step_size=step_size, restarts=restarts, loss=loss)
    except ValueError as error:
        raise UserError(f"attack {name!r}: {error}") from None
    if name.startswith("pgd"):
        return NamedAttack(name, settings, _on_logits(attack))
    if not is_moe:
        raise UserError(f"attack {name!r} needs a router; the network is dense (num_experts=1)")
    through = _straight_through if name.startswith("ste") else _on_router
    return NamedAttack(name, settings, through(attack))


def _on_logits(attack: Attack) -> Callable[..., Array]:
    def perturb(
        network: Network, params: Tree, stats: Tree, images: Array, labels: Array, keys: Array
    ) -> Array:
        return attack(lambda x: network.apply(params, stats, x)[0].logits, images, labels, keys)

    return perturb


def _straight_through(attack: Attack) -> Callable[..., Array]:
    def perturb(
        network: Network, params: Tree, stats: Tree, images: Array, labels: Array, keys: Array
    ) -> Array:
        def logits(images: Array) -> Array:
            return network.apply(params, stats, images, surrogate=True)[0].logits

        return attack(logits, images, labels, keys)

    return perturb


def _on_router(attack: Attack) -> Callable[..., Array]:
    def perturb(
        network: Network, params: Tree, stats: Tree, images: Array, labels: Array, keys: Array
    ) -> Array:
        experts = labels % network.num_experts

        def scores(images: Array) -> Array:
            return network.route(params, stats, images)[0].scores

        return attack(scores, images, experts, keys)

    return perturb
