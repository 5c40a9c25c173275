"""The attacks that an evaluation can name: one record each, and the table of them.

Some perturb a batch in one program (PGD and its relatives). The others take their time, run on
images that are still robust, and can be resumed (``is_ensemble``): AutoAttack and its parts, and
the attacks on a mixture of experts.

``ste_pgd<N>`` follows the gradient that a straight-through gate pretends to have, as the published
evaluation does. It is there for comparison: that gradient is not the loss's, and PGD on it finds
less. ``router`` and ``router_kl`` perturb images so that the router errs, and do not look at the
classifier: the published evaluation's ``CE(r(x'), y mod N)``, and ``KL(r(x) || r(x'))``.

``vmoe_pgd`` is that of the study of V-MoE (Puigcerver et al., NeurIPS 2022): 40 steps of epsilon/40
from the clean image, the last iterate; but for the pixel range, which the published code leaves.
``vmoe_pgd_aux`` attacks the importance loss, too, of each image's own tokens.
``sampled_pathway`` is ``worst_pathway`` with random routes besides those of one expert, for
networks whose routes are too many to list.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from advmoe_jax.attacks import (
    LOSSES,
    Attack,
    Loss,
    Threat,
    autoattack,
    cw,
    deepfool,
    eot_pgd,
    ffgsm,
    fgsm,
    mi_fgsm,
    moe_suite,
    pathways,
    pgd,
    r_fgsm,
    tpgd,
)
from advmoe_jax.attacks.gate import gate_steps
from advmoe_jax.attacks.routed import joint_steps, route_steps
from advmoe_jax.attacks.stepwise import Stepwise
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import views
from advmoe_jax.evaluation.exit_attacks import EXIT_ATTACKS
from advmoe_jax.evaluation.records import NamedAttack, Protocol, Record
from advmoe_jax.types import Array

_EOT = {"eot_samples": 4}
# What a name may end in where digits are part of it: ``exit3_40`` is 40 steps on exit 3.
_WITH_NUMBER = r"([a-z_-]*[a-z])([1-9]\d{0,5})|(exit\d+(?:_apgd)?)_([1-9]\d{0,5})"
_RAND_SAMPLES = 20
_ONE_TRY = {"restarts": 1}
_SAMPLES = {"samples": 8}
# Of the importance loss of each layer, published.
AUXILIARY_WEIGHT = 0.005


def _steps(attack: NamedAttack) -> dict[str, Any]:
    return {"num_steps": attack.num_steps} | _ONE_TRY


def _apgd(attack: NamedAttack) -> dict[str, Any]:
    return {"num_steps": attack.num_steps, "restarts": attack.restarts}


def _pgd(attack: NamedAttack) -> dict[str, Any]:
    return {
        "num_steps": attack.num_steps,
        "step_size": attack.step_size,
        "restarts": attack.restarts,
    }


def _one_step(
    make: Callable[[Threat], Attack], size: Callable[[NamedAttack], float], **fields: Any
) -> Record:
    """A record of an attack of steps that are as long as ``size`` says."""
    fields = {"reaches_edge": True} | fields
    return Record(lambda a: make(a.threat), lambda a: {"step_size": size(a)} | _steps(a), **fields)


def _part(part: str, steps: int, about: str, **tries: Callable[[NamedAttack], int]) -> Record:
    """A record of one attack of AutoAttack."""
    length = "num_queries" if part == "square" else "num_steps"

    def settings(a: NamedAttack) -> dict[str, Any]:
        return {length: a.num_steps} | {name: of(a) for name, of in tries.items()}

    return Record(
        lambda a: autoattack(a.threat, "custom", attacks=[part], **settings(a)),
        settings,
        steps=steps,
        is_counted=True,
        view=views.whole,
        is_ensemble=True,
        about=about,
    )


def _version(version: str, about: str) -> Record:
    return Record(
        lambda a: autoattack(a.threat, version),
        lambda a: {"version": version, "num_steps": 100, "num_queries": 5000},
        view=views.whole,
        is_ensemble=True,
        about=about,
    )


def _randomised(attack: NamedAttack) -> Any:
    @lru_cache(maxsize=8)  # the same steps again: what is compiled of them serves later calls
    def plan(num_classes: int) -> dict[str, Stepwise]:
        losses = {"apgd-ce": "cross_entropy", "apgd-dlr": "dlr" if num_classes > 2 else "margin"}
        return {
            name: gate_steps(attack.threat, "hard", loss=loss, eot_samples=_RAND_SAMPLES)
            for name, loss in losses.items()
        }

    return autoattack(attack.threat, "custom", attacks=plan(3))._replace(plan=plan)


def _on_mixture(make: Callable[[NamedAttack], Any], about: str, **settings: Any) -> Record:
    """A record of an ensemble that knows of routes."""
    return Record(
        make,
        lambda a: _apgd(a) | settings,
        steps=100,
        is_counted=True,
        view=views.routed,
        needs="router",
        is_ensemble=True,
        about=about,
    )


def _custom(name: str, steps: Callable[..., Any], **fixed: Any) -> Callable[[NamedAttack], Any]:
    return lambda a: autoattack(
        a.threat, "custom", attacks={name: steps(a.threat, **_apgd(a), **fixed)}
    )


def _vmoe_pgd(attack: NamedAttack) -> dict[str, Any]:
    steps = max(attack.num_steps, 1)
    return {"num_steps": attack.num_steps, "step_size": attack.threat.epsilon / steps}


def _with_auxiliary(outputs: tuple[Array, Array], labels: Array) -> Array:
    logits, importance = outputs
    return LOSSES["cross_entropy"].value(logits, labels) + AUXILIARY_WEIGHT * importance


_AUXILIARY = Loss(
    _with_auxiliary, lambda outputs, labels: LOSSES["cross_entropy"].fooled(outputs[0], labels)
)


def _of_restarts(attack: NamedAttack) -> int:
    return attack.restarts


ATTACKS: dict[str, Record] = {
    "clean": Record(
        lambda a: lambda function, images, labels, keys: images,
        lambda a: {},
        about="nothing: the images as they are",
    ),
    "fgsm": _one_step(
        fgsm, lambda a: a.threat.epsilon, steps=1, about="one gradient step from the image"
    ),
    "rfgsm": _one_step(
        r_fgsm, lambda a: a.threat.epsilon / 2, steps=1, about="FGSM after a step of random signs"
    ),
    "ffgsm": _one_step(
        ffgsm, lambda a: 1.25 * a.threat.epsilon, steps=1, about="FGSM from a random point"
    ),
    "mifgsm": Record(
        lambda a: mi_fgsm(a.threat, num_steps=a.num_steps),
        lambda a: {"step_size": a.threat.epsilon / max(a.num_steps, 1)} | _steps(a),
        steps=10,
        is_counted=True,
        reaches_edge=True,
        about="PGD with momentum",
    ),
    "pgd": Record(
        lambda a: pgd(a.threat, **_pgd(a)),
        _pgd,
        steps=None,
        is_counted=True,
        about="projected gradient descent on cross-entropy, random start",
    ),
    "ste_pgd": Record(
        lambda a: pgd(a.threat, **_pgd(a)),
        _pgd,
        steps=None,
        is_counted=True,
        view=views.straight_through,
        needs="router",
        about="PGD on straight-through gradients, as published; finds less",
    ),
    "vmoe_pgd": Record(
        lambda a: pgd(a.threat, start="none", **_vmoe_pgd(a)),
        lambda a: _vmoe_pgd(a) | {"start": "none"} | _ONE_TRY,
        steps=40,
        is_counted=True,
        reaches_edge=True,
        about="PGD of the study of V-MoE: steps of epsilon/N from the image",
    ),
    "vmoe_pgd_aux": Record(
        lambda a: pgd(a.threat, start="none", loss=_AUXILIARY, **_vmoe_pgd(a)),
        lambda a: _vmoe_pgd(a) | {"start": "none", "auxiliary": AUXILIARY_WEIGHT} | _ONE_TRY,
        steps=40,
        is_counted=True,
        view=views.with_importance,
        needs="router",
        reaches_edge=True,
        about="vmoe_pgd on the importance loss too",
    ),
    "tpgd": Record(
        lambda a: tpgd(a.threat, num_steps=a.num_steps, step_size=a.step_size),
        lambda a: _pgd(a) | _ONE_TRY,
        steps=10,
        is_counted=True,
        about="TRADES' inner maximisation: KL to the clean outputs",
    ),
    "eotpgd": Record(
        lambda a: eot_pgd(a.threat, **_pgd(a), **_EOT),
        lambda a: _pgd(a) | _EOT,
        steps=10,
        is_counted=True,
        view=views.noisy_gate,
        needs="router",
        about="PGD by the mean gradient over four noisy routes",
    ),
    "cw": Record(
        lambda a: cw(a.threat, num_steps=a.num_steps),
        _steps,
        steps=1000,
        is_counted=True,
        about="Carlini and Wagner: nearest adversarial image by Adam",
    ),
    "deepfool": Record(
        lambda a: deepfool(a.threat, num_steps=a.num_steps),
        _steps,
        steps=50,
        is_counted=True,
        about="steps to the nearest linearised boundary",
    ),
    "apgd-ce": _part(
        "apgd-ce", 100, "PGD that finds its step size, on cross-entropy", restarts=_of_restarts
    ),
    "apgd-dlr": _part("apgd-dlr", 100, "APGD on the DLR loss", restarts=_of_restarts),
    "apgd-t": _part("apgd-t", 100, "APGD towards nine classes"),
    "fab": _part("fab", 100, "smallest perturbation along the boundary", restarts=_of_restarts),
    "fab-t": _part("fab-t", 100, "FAB towards nine classes"),
    "square": _part("square", 5000, "random search by queries, no gradient"),
    "autoattack": _version("standard", "apgd-ce, apgd-t, fab-t, square: the field's standard"),
    "autoattack_plus": _version("plus", "also apgd-dlr and fab, five restarts"),
    "autoattack_rand": Record(
        _randomised,
        lambda a: {"version": "rand", "num_steps": 100, "eot_samples": _RAND_SAMPLES} | _ONE_TRY,
        view=views.routed,
        needs="router",
        is_ensemble=True,
        about="apgd-ce and apgd-dlr by the mean over 20 draws of the route",
    ),
    "moe": _on_mixture(
        lambda a: moe_suite(a.threat, **_apgd(a), **_EOT),
        "minimum over the six that follow: route to worst_pathway",
        **_EOT,
        judge="the network, then each pathway held fixed",
    ),
    "route": _on_mixture(_custom("route", route_steps), "APGD on the router: leave the route"),
    "joint": _on_mixture(_custom("joint", joint_steps), "APGD on loss and router together"),
    "straight_through": _on_mixture(
        _custom("straight_through", gate_steps, gate="straight_through", **_EOT),
        "APGD through a gate hard forward, soft backward",
        **_EOT,
    ),
    "softmax_gate": _on_mixture(
        _custom("softmax_gate", gate_steps, gate="softmax", **_EOT),
        "APGD through a soft gate: all experts, weighed",
        **_EOT,
    ),
    "frozen_route": _on_mixture(
        lambda a: pathways(a.threat, **_apgd(a), frozen=True),
        "APGD on the clean image's pathway, held fixed",
        judge="the pathway held fixed",
    ),
    "worst_pathway": _on_mixture(
        lambda a: pathways(a.threat, **_apgd(a)),
        "APGD on every pathway within reach, held fixed",
        judge="the pathway held fixed",
    ),
    "sampled_pathway": _on_mixture(
        lambda a: pathways(a.threat, **_apgd(a), **_SAMPLES),
        "worst_pathway with random routes, where routes are too many",
        **_SAMPLES,
        judge="the pathway held fixed",
    ),
    "router": Record(
        lambda a: pgd(a.threat, **_pgd(a)),
        _pgd,
        steps=20,
        view=views.router_scores,
        needs="router",
        target=lambda network, labels: labels % network.num_experts,
        about="PGD on the router alone, CE(r(x'), y mod N), as published",
    ),
    "router_kl": Record(
        lambda a: pgd(a.threat, loss="kl", **_pgd(a)),
        _pgd,
        steps=20,
        view=views.router_scores,
        needs="router",
        about="PGD on the router alone, KL(r(x) || r(x'))",
    ),
    **EXIT_ATTACKS,
}
NAMES = ", ".join(
    f"{name}<steps> such as {name}20" if record.steps is None else name
    for name, record in ATTACKS.items()
    if record.side_exit <= 1
)


def parse_name(name: str) -> tuple[str, int]:
    """(kind, number of steps) of an attack's name.

    Raises:
        UserError: if there is no such attack.
    """
    if name in ATTACKS and ATTACKS[name].steps is not None:
        return name, ATTACKS[name].steps
    match = re.fullmatch(_WITH_NUMBER, name)
    kind, steps = filter(None, match.groups()) if match else ("", 0)
    if kind not in ATTACKS or not ATTACKS[kind].is_counted:
        raise UserError(f"attack {name!r} is unknown; choose from {NAMES}")
    return kind, int(steps)


def named_attack(
    name: str, protocol: Protocol, parts: Sequence[str], threat: Threat | None = None
) -> NamedAttack:
    """One attack by name; see ``parse_attacks``."""
    kind, steps = parse_name(name)
    usual, step_size = protocol.threat, protocol.step_size
    threat = threat or usual
    threat = threat._replace(epsilon=float(threat.epsilon))  # it may be an array
    if threat != usual:  # steps keep their share of the ball
        step_size *= threat.epsilon / usual.epsilon
        title = f"{name}@{threat.norm}-{float(threat.epsilon):.6g}"
    if threat == usual or kind == "clean":  # clean images are those of every threat model
        title = name
    record = ATTACKS[kind]
    if (needed := record.needs) and needed not in parts:
        raise UserError(
            f"attack {name!r} is on the part {needed!r}; the network has {', '.join(parts)}"
        )
    attack = NamedAttack(title, record, threat, steps, step_size, protocol.restarts)
    try:
        attack.check()
    except ValueError as error:
        other = "; --norm and --epsilon give another" if "defined for" in str(error) else ""
        raise UserError(f"attack {name!r}: {error}{other}") from None
    return attack
