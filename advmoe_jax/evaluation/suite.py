"""The attacks an evaluation can name; the README's table says what each one is.

Some perturb a batch in one program (PGD and its relatives). The others take their time, run on
images that are still robust, and can be resumed (``packed``): AutoAttack and its parts, and the
attacks on a mixture of experts.

``ste_pgd<N>`` follows the gradient that a straight-through gate pretends to have, as the published
evaluation does. It is there for comparison: that gradient is not the loss's, and PGD on it finds
less.

``router`` and ``router_kl`` perturb images so that the router errs, and do not look at the
classifier: the published evaluation's ``CE(r(x'), y mod N)``, and ``KL(r(x) || r(x'))``.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from advmoe_jax.attacks import (
    Attack,
    Threat,
    autoattack,
    cw,
    deepfool,
    eot_pgd,
    ffgsm,
    fgsm,
    make_threat,
    mi_fgsm,
    moe_suite,
    pathways,
    pgd,
    r_fgsm,
    through_gate,
    tpgd,
)
from advmoe_jax.attacks.gate import gate_steps
from advmoe_jax.attacks.routed import joint_steps, route_steps
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.attacked import attacked
from advmoe_jax.models.network import Network

Array = jax.Array
Tree = dict[str, Any]
Perturb = Callable[[Network, Tree, Tree, Array, Array, Array], Array]

EOT_SAMPLES = 4
RAND_SAMPLES = 20
# Names that take a number of steps, and the number they have without; None: it must be given.
_STEPS = {
    "pgd": None,
    "ste_pgd": None,
    "mifgsm": 10,
    "tpgd": 10,
    "eotpgd": 10,
    "cw": 1000,
    "deepfool": 50,
    "apgd": 100,
    "apgd-dlr": 100,
    "apgd-t": 100,
    "fab": 100,
    "fab-t": 100,
    "square": 5000,
    "route": 100,
    "joint": 100,
    "straight_through": 100,
    "softmax_gate": 100,
    "frozen_route": 100,
    "worst_pathway": 100,
    "moe": 100,
}
_ONE_STEP = ("fgsm", "rfgsm", "ffgsm")
_ROUTER = {"router": 20, "router_kl": 20}
_AUTOATTACK = {"autoattack": "standard", "autoattack_plus": "plus", "autoattack_rand": "rand"}
_NEED_A_ROUTER = (
    "ste_pgd",
    "router",
    "router_kl",
    "eotpgd",
    "autoattack_rand",
    "route",
    "joint",
    "straight_through",
    "softmax_gate",
    "frozen_route",
    "worst_pathway",
    "moe",
)
NAMES = (
    "clean, fgsm, rfgsm, ffgsm, mifgsm, pgd<steps> such as pgd20, tpgd, eotpgd, cw, deepfool, "
    "apgd, apgd-dlr, apgd-t, fab, fab-t, square, autoattack, autoattack_plus, autoattack_rand, "
    "moe, route, joint, straight_through, softmax_gate, frozen_route, worst_pathway, router, "
    "router_kl, ste_pgd<steps>"
)


class NamedAttack(NamedTuple):
    """An attack on a whole network.

    Attributes:
        name: as the user wrote it; ``@norm-epsilon`` behind it under another threat model than
            the config's.
        settings: what stands beside its numbers: norm, epsilon, steps, ... ({} for ``clean``).
        threat: the ball that its images are checked against.
        perturb: (network, params, stats, images, labels, keys [B]) -> images; or None.
        packed: what ``autoattack`` returns, or something that is called alike; or None.
    """

    name: str
    settings: dict[str, Any]
    threat: Threat
    perturb: Perturb | None = None
    packed: Callable[..., Any] | None = None


def parse_attacks(
    names: str, config: ConfigDict, is_moe: bool, threat: Threat | None = None
) -> list[NamedAttack]:
    """The attacks of a comma-separated list, ``clean`` first whether named or not.

    Args:
        names: such as ``clean,fgsm,pgd20,autoattack,moe``.
        config: the whole config; ``attack.norm`` and ``attack.epsilon`` are the threat model,
            ``evaluation.step_size`` and ``evaluation.restarts`` the rest.
        is_moe: whether the network has a router.
        threat: another threat model than the config's; see ``other_threat``.

    Raises:
        UserError: if a name is unknown, or attacks a router that is not there.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unique = list(dict.fromkeys(["clean", *wanted]))
    return [named_attack(name, config, is_moe, threat) for name in unique]


def other_threat(norm: str, epsilon: str, config: ConfigDict) -> Threat | None:
    """The threat model of ``--norm`` and ``--epsilon``; None if both are empty.

    Args:
        norm: linf, l2 or l1, or empty for the config's.
        epsilon: a number or a fraction such as ``8/255``, or empty for the config's.
        config: the whole config.

    Raises:
        UserError: if there is no such threat model.
    """
    if not norm and not epsilon:
        return None
    if not epsilon and norm != config.attack.norm:
        raise UserError(
            f"--norm={norm} needs an --epsilon: the config's {config.attack.epsilon:g} is a radius "
            f"in {config.attack.norm}"
        )
    try:
        radius = _number(epsilon) if epsilon else config.attack.epsilon
        return make_threat(norm or config.attack.norm, radius)
    except ValueError as error:
        raise UserError(f"--norm and --epsilon: {error}") from None


def _number(text: str) -> float:
    part = r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)\s*"
    match = re.fullmatch(f"{part}(?:/{part})?", text)
    if not match or (match[2] and float(match[2]) == 0):
        raise UserError(f"--epsilon={text} is no radius: give a number such as 0.031 or 8/255")
    return float(match[1]) / float(match[2] or 1)


def named_attack(
    name: str, config: ConfigDict, is_moe: bool, threat: Threat | None = None
) -> NamedAttack:
    """One attack by name; see ``parse_attacks``."""
    try:
        usual = make_threat(config.attack.norm, config.attack.epsilon)
        threat = threat or usual
        threat = threat._replace(epsilon=float(threat.epsilon))  # it may be an array
        asked = _ask(name, config, usual, threat)
        if name == "clean":
            return NamedAttack(name, {}, threat, _unperturbed)
        if asked is None:
            raise UserError(f"attack {name!r} is unknown; choose from {NAMES}")
        if asked.kind in _NEED_A_ROUTER and not is_moe:
            raise UserError(f"attack {name!r} needs a router; the network is dense (num_experts=1)")
        found = _batchwise(asked) or _packed(asked)
    except ValueError as error:
        other = "; --norm and --epsilon give another" if "defined for" in str(error) else ""
        raise UserError(f"attack {name!r}: {error}{other}") from None
    if threat != usual:
        found = found._replace(name=f"{name}@{threat.norm}-{float(threat.epsilon):.6g}")
    return found


class _Asked(NamedTuple):
    """What a name and the config ask for."""

    name: str
    kind: str
    threat: Threat
    steps: int
    step_size: float
    restarts: int

    @property
    def ball(self) -> dict[str, Any]:
        return {"norm": self.threat.norm, "epsilon": self.threat.epsilon}


def _ask(name: str, config: ConfigDict, usual: Threat, threat: Threat) -> _Asked | None:
    step_size, restarts = config.evaluation.step_size, config.evaluation.restarts
    if threat != usual:  # steps keep their share of the ball
        step_size *= threat.epsilon / usual.epsilon
    kind, steps = name, {**_ROUTER, **dict.fromkeys(_ONE_STEP, 1)}.get(name, 0)
    if not steps and name not in _AUTOATTACK:
        match = re.fullmatch(r"([a-z_-]*[a-z])([1-9]\d{0,5})?", name)
        if not match or match[1] not in _STEPS:
            return None
        kind, steps = match[1], int(match[2]) if match[2] else _STEPS[match[1]]
        if steps is None:
            return None
    return _Asked(name, kind, threat, steps, step_size, restarts)


# The same attack for the same words, so that what is compiled for one network serves the next.
@lru_cache(maxsize=64)
def _batchwise(asked: _Asked) -> NamedAttack | None:
    """Attacks that perturb a batch in one program."""
    threat, steps, step_size = asked.threat, asked.steps, asked.step_size
    of_pgd = {"num_steps": steps, "step_size": step_size, "restarts": asked.restarts}
    eot = {"eot_samples": EOT_SAMPLES}
    single, few = {"restarts": 1}, {"num_steps": steps, "restarts": 1}
    table: dict[str, tuple[Callable[[], Attack], dict[str, Any], Callable[..., Any]]] = {
        "fgsm": (lambda: fgsm(threat), {"step_size": threat.epsilon} | few, _logits),
        "rfgsm": (lambda: r_fgsm(threat), {"step_size": threat.epsilon / 2} | few, _logits),
        "ffgsm": (lambda: ffgsm(threat), {"step_size": 1.25 * threat.epsilon} | few, _logits),
        "mifgsm": (
            lambda: mi_fgsm(threat, num_steps=steps),
            {"step_size": threat.epsilon / max(steps, 1)} | few,
            _logits,
        ),
        "pgd": (lambda: pgd(threat, **of_pgd), of_pgd, _logits),
        "ste_pgd": (lambda: pgd(threat, **of_pgd), of_pgd, _straight_through),
        "tpgd": (
            lambda: tpgd(threat, num_steps=steps, step_size=step_size),
            of_pgd | single,
            _logits,
        ),
        "eotpgd": (lambda: eot_pgd(threat, **of_pgd, **eot), of_pgd | eot, _noisy_gate),
        "cw": (lambda: cw(threat, num_steps=steps), few, _logits),
        "deepfool": (lambda: deepfool(threat, num_steps=steps), few, _logits),
        "router": (lambda: pgd(threat, **of_pgd), of_pgd, _router_scores),
        "router_kl": (lambda: pgd(threat, loss="kl", **of_pgd), of_pgd, _router_scores),
    }
    if asked.kind not in table:
        return None
    make, settings, function = table[asked.kind]
    attack = make()

    def perturb(
        network: Network, params: Tree, stats: Tree, images: Array, labels: Array, keys: Array
    ) -> Array:
        if function is _router_scores:
            labels = labels % network.num_experts
        return attack(function(network, params, stats), images, labels, keys)

    return NamedAttack(asked.name, asked.ball | settings, threat, perturb)


@lru_cache(maxsize=64)
def _packed(asked: _Asked) -> NamedAttack:
    """Attacks that run on what is left of the images, with a state on disk."""
    threat, steps, restarts = asked.threat, asked.steps, asked.restarts
    apgd = {"num_steps": steps, "restarts": restarts}
    eot = {"eot_samples": EOT_SAMPLES}
    settings: dict[str, Any]
    if asked.kind == "autoattack_rand":
        settings = {"version": "rand", "num_steps": 100, "restarts": 1, "eot_samples": RAND_SAMPLES}
        parts = {
            name: gate_steps(threat, "hard", loss=loss, eot_samples=RAND_SAMPLES)
            for name, loss in (("apgd-ce", "cross_entropy"), ("apgd-dlr", "dlr"))
        }
        run = autoattack(threat, "custom", attacks=parts)
    elif asked.kind in _AUTOATTACK:
        settings = {"version": _AUTOATTACK[asked.kind], "num_steps": 100, "num_queries": 5000}
        run = autoattack(threat, settings["version"])
    elif asked.kind == "moe":
        settings = apgd | eot | {"judge": "the network, then each pathway held fixed"}
        run = moe_suite(threat, **apgd, **eot)
    elif asked.kind in ("frozen_route", "worst_pathway"):
        settings = apgd | {"judge": "the pathway held fixed"}
        run = pathways(threat, **apgd, frozen=asked.kind == "frozen_route")
    elif asked.kind in ("route", "joint", "straight_through", "softmax_gate"):
        steps_of = {
            "route": lambda: route_steps(threat, **apgd),
            "joint": lambda: joint_steps(threat, **apgd),
            "straight_through": lambda: gate_steps(threat, "straight_through", **apgd, **eot),
            "softmax_gate": lambda: gate_steps(threat, "softmax", **apgd, **eot),
        }
        settings = apgd | (eot if asked.kind in ("straight_through", "softmax_gate") else {})
        run = autoattack(threat, "custom", attacks={asked.kind: steps_of[asked.kind]()})
    else:
        part = "apgd-ce" if asked.kind == "apgd" else asked.kind
        length = "num_queries" if part == "square" else "num_steps"
        tries = {"restarts": restarts} if part in ("apgd-ce", "apgd-dlr", "fab") else {}
        settings = {length: steps} | tries
        run = autoattack(threat, "custom", attacks=[part], **{length: steps}, **tries)
    return NamedAttack(asked.name, asked.ball | settings, threat, packed=run)


def _unperturbed(
    network: Network, params: Tree, stats: Tree, images: Array, labels: Array, keys: Array
) -> Array:
    return images


def _logits(network: Network, params: Tree, stats: Tree) -> Callable[[Array], Array]:
    return lambda x: network.apply(params, stats, x)[0].logits


def _straight_through(network: Network, params: Tree, stats: Tree) -> Callable[[Array], Array]:
    return lambda x: network.apply(params, stats, x, surrogate=True)[0].logits


def _router_scores(network: Network, params: Tree, stats: Tree) -> Callable[[Array], Array]:
    return lambda x: network.route(params, stats, x)[0].scores


def _noisy_gate(network: Network, params: Tree, stats: Tree) -> Callable[[Array, Array], Array]:
    return through_gate(attacked(network, params, stats), "hard")
