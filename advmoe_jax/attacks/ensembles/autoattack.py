"""AutoAttack: the ensemble by which robust accuracy is reported.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020. Each attack runs only on the images that are still classified
correctly; the batches are re-packed while it runs (``packing``).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from advmoe_jax.attacks.apgd import apgd_steps
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.ensembles.checks import check_deterministic
from advmoe_jax.attacks.ensembles.packing import Outcome, Slots, Task, attack_packed, empty_slots
from advmoe_jax.attacks.ensembles.progress import Bar
from advmoe_jax.attacks.ensembles.record import AutoAttackRecord
from advmoe_jax.attacks.ensembles.results import AutoAttackResult
from advmoe_jax.attacks.ensembles.runner import Asked, Saved, ask, confirmed, go_on
from advmoe_jax.attacks.fab import fab_steps
from advmoe_jax.attacks.square import square_steps
from advmoe_jax.attacks.stepwise import Stepwise, check_classes
from advmoe_jax.parallel import whole
from advmoe_jax.types import Array

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


class AutoAttack(NamedTuple):
    """AutoAttack with its settings, to be called on a function and any number of images.

    Attributes:
        threat: the ball and the pixel range.
        plan: number of classes -> the attacks by name, in the order they run.
        eot_samples: draws of the function's noise that a step averages over; 0: it has none.
    """

    threat: Threat
    plan: Callable[[int], dict[str, Stepwise]]
    eot_samples: int

    def __call__(
        self,
        function: Callable[..., Array],
        images: Array,
        labels: Array,
        key: Array | int,
        *,
        batch_size: int = 128,
        individual: bool = False,
        state_file: str | Path | None = None,
        progress: bool = True,
        mesh: Mesh | None = None,
        pause: Callable[[], None] = go_on,
    ) -> AutoAttackResult:
        """Attacks every image.

        Args:
            function: images [B, ...] -> logits [B, K], each image alone. The arrays of a
                ``functools.partial`` or ``jax.tree_util.Partial`` are arguments of the compiled
                program, which serves later calls with other arrays (so what such a function reads
                besides them must not change); those of a closure are constants in it, which
                compiles more slowly, and anew at every call.
            images: float [n, ...] in the threat's pixel range.
            labels: int [n].
            key: one PRNG key, or one per image; or a seed.
            batch_size: images attacked at once; fewer where that leaves no slot empty.
            individual: every attack runs on all images that are classified correctly, so that
                each one's own robust accuracy is known; costs more.
            state_file: where the state is kept while it runs; the same call goes on from there,
                with the same result. Another function needs a file of its own: the function is
                known by its logits on the clean images alone.
            progress: whether to show a bar with the time left.
            mesh: images are split over all its devices, of which ``batch_size`` must be a
                multiple; the function's arrays are on every device, or spread over the mesh as
                they lie, if the function knows how to. None: the default device. The
                devices may be several processes', which all call this with the same arguments and
                get the same result; the first one alone writes the state.
            pause: called between two calls of the device; if it raises, the state is saved first.

        Raises:
            ValueError: if images, labels or the function's outputs make no sense, or the state
                file is damaged or of another evaluation.
        """
        asked = ask(
            self.threat,
            function,
            images,
            labels,
            key,
            batch_size=batch_size,
            mesh=mesh,
            eot_samples=self.eot_samples,
        )
        suspicious = list(asked.warnings)
        if not self.eot_samples:
            first, given = asked.images[:batch_size], asked.device.function
            suspicious += check_deterministic(*(whole(given(first)) for _ in range(2)))
        cascade = _Cascade(asked, self.plan(asked.logits.shape[1]), _ranked(asked), individual)
        for steps in cascade.parts.values():
            check_classes(steps, asked.logits.shape[1])
        return _attack_all(cascade, self.eot_samples, suspicious, state_file, progress, pause)


def autoattack(
    threat: Threat,
    version: str = "standard",
    *,
    attacks: Sequence[str] | Mapping[str, Stepwise] | None = None,
    num_steps: int = 100,
    num_queries: int = 5000,
    num_targets: int | None = None,
    restarts: int | None = None,
    eot_samples: int | None = None,
) -> AutoAttack:
    """AutoAttack on a threat model; the result is called as ``AutoAttack`` says::

        result = autoattack(linf(8 / 255))(logits_fn, images, labels, jax.random.key(0))
        result.robust_accuracy, result.fooled_by

    Args:
        threat: linf, l2 or l1.
        version: ``standard``: APGD-CE, targeted APGD-DLR, targeted FAB, Square; ``plus``: also
            untargeted APGD-DLR and FAB, five restarts each; ``rand``: APGD-CE and APGD-DLR on a
            randomised ``function(images, keys)`` with one PRNG key per image; ``custom``:
            ``attacks``.
        attacks: for ``custom``: names out of apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square in
            the order they run, or a mapping from names to attacks cut in steps.
        num_steps: of APGD and FAB.
        num_queries: of Square.
        num_targets: of the targeted attacks; default 9 (l1: 5 for APGD), or the wrong classes
            there are. DLR does not exist for 2 classes, nor targeted DLR for 2 and 3: the margin,
            which is DLR without its scale, stands in.
        restarts: of APGD-CE, APGD-DLR and FAB; default 1, in ``plus`` and in l1 5.
        eot_samples: draws a step averages over; default 20 for ``rand``, else 0.

    Raises:
        ValueError: if a setting is not valid.
    """
    names = _names(threat, version, attacks)
    eot = (20 if version == "rand" else 0) if eot_samples is None else eot_samples
    if eot and not all(name.startswith("apgd") for name in names):
        raise ValueError("a randomised function is attacked by apgd-ce, apgd-dlr and apgd-t alone")

    # The same steps for the same number of classes: what is compiled of them serves later calls.
    @lru_cache(maxsize=8)
    def plan(num_classes: int) -> dict[str, Stepwise]:
        if isinstance(attacks, Mapping):
            return dict(attacks)
        parts = {}
        for name in names:
            default = 5 if threat.norm == "l1" and name == "apgd-t" else 9
            targets = min(default, num_classes - 1) if num_targets is None else num_targets
            tries = 5 if version == "plus" or (threat.norm == "l1" and name[:3] != "fab") else 1
            tries = tries if restarts is None else restarts
            loss = _loss(name, num_classes)
            parts[name] = _steps(threat, name, loss, num_steps, num_queries, targets, tries, eot)
        return parts

    plan(10)  # wrong settings are refused here, not after the first hour

    return AutoAttack(threat, plan, eot)


def _names(threat: Threat, version: str, attacks: Any) -> tuple[str, ...]:
    if version == "custom":
        if not attacks:
            raise ValueError("version 'custom' needs attacks: name some of " + ", ".join(NAMES))
        if isinstance(attacks, Mapping):
            return tuple(attacks)
        unknown = [name for name in attacks if name not in NAMES]
        if unknown:
            raise ValueError(f"attack {unknown[0]!r} is unknown; choose from {', '.join(NAMES)}")
        return tuple(dict.fromkeys(attacks))
    if version not in VERSIONS:
        raise ValueError(
            f"version {version!r} is unknown; choose one of {', '.join(VERSIONS)}, custom"
        )
    if attacks is not None:
        raise ValueError(f"version {version!r} has its own attacks: use version='custom'")
    return VERSIONS[version]


def _steps(
    threat: Threat,
    name: str,
    loss: str,
    num_steps: int,
    num_queries: int,
    num_targets: int,
    restarts: int,
    eot_samples: int,
) -> Stepwise:
    """One of the attacks of ``NAMES``; ``loss`` is APGD's."""
    if name == "square":
        return square_steps(threat, num_queries=num_queries)
    targets, tries = {"num_targets": num_targets}, {"restarts": restarts}
    if name.startswith("fab"):
        settings = {"targeted": True, **targets} if name == "fab-t" else tries
        return fab_steps(threat, num_steps=num_steps, **settings)
    settings = {**(targets if name == "apgd-t" else tries), "shrinking": threat.norm == "l1"}
    return apgd_steps(threat, loss=loss, num_steps=num_steps, eot_samples=eot_samples, **settings)


def _loss(name: str, num_classes: int) -> str:
    """What that attack maximises: DLR has a scale for 3 classes and more, targeted for 4."""
    if name == "apgd-dlr":
        return "dlr" if num_classes > 2 else "margin"
    if name == "apgd-t":
        return "dlr_targeted" if num_classes > 3 else "margin_targeted"
    return "cross_entropy"


class _Cascade(NamedTuple):
    """The attacks of one call, in their order."""

    asked: Asked
    parts: dict[str, Stepwise]
    ranked: Int[np.ndarray, "images wrong"]
    individual: bool

    def task(self, name: str) -> Task:
        """What the attack of that name runs on."""
        asked = self.asked
        return Task(asked.images, asked.labels, self.ranked, asked.key_data(name), asked.impl)

    def empty(self, part: int, size: int) -> Slots:
        """Empty slots of an attack."""
        name = list(self.parts)[part]
        return empty_slots(self.parts[name], self.task(name), size)


def _ranked(asked: Asked) -> Int[np.ndarray, "images wrong"]:
    """The wrong classes of every image, most likely first."""
    logits = asked.logits
    right = np.eye(logits.shape[1], dtype=bool)[asked.labels]
    order = np.argsort(np.where(right, np.inf, -logits.astype(np.float32)), 1, kind="stable")
    return order[:, :-1].astype(np.int32)


def _attack_all(
    cascade: _Cascade,
    eot_samples: int,
    suspicious: list[str],
    state_file: str | Path | None,
    progress: bool,
    pause: Callable[[], None],
) -> AutoAttackResult:
    """Every attack, from where the state file left off."""
    _warn(suspicious)
    asked, parts = cascade.asked, cascade.parts
    settings = [
        (name, s.num_steps, s.restarts, s.num_targets, s.eot_samples, s.identity)
        for name, s in parts.items()
    ]
    saved = Saved(asked, state_file, settings, eot_samples, cascade.individual)
    before = saved.load()
    if before is None:
        record = AutoAttackRecord.begin(asked)
        record.warnings += suspicious
    else:
        record = AutoAttackRecord.restore(before, cascade.empty)
    with Bar(progress) as bar:
        for name in list(parts)[record.part :]:
            _warn(_attack(cascade, name, record, saved, bar, pause, not eot_samples))
            saved.save(record)
    return record.result(asked)


def _attack(
    cascade: _Cascade,
    name: str,
    record: AutoAttackRecord,
    saved: Saved,
    bar: Bar,
    pause: Callable[[], None],
    is_verified: bool,
) -> list[str]:
    """One attack; returns what is suspicious about it."""
    asked, steps, now = cascade.asked, cascade.parts[name], record.now
    tried = asked.correct if cascade.individual else record.robust | now.fell
    waiting = tried & ~now.through
    slots = now.slots
    if slots is None:
        slots = cascade.empty(record.part, asked.size_for(int(tried.sum())))
    waiting[slots.image[slots.image >= 0]] = False
    queue = np.flatnonzero(waiting)

    def note(outcome: Outcome) -> None:
        record.note(name, outcome)
        bar.show(*_progress(cascade, record, tried, outcome.under_way))

    calls = attack_packed(steps, asked.device, cascade.task(name), queue, slots)
    saved.carry_out(calls, note, record, pause)
    told = _verify(asked, name, record) if is_verified else []
    alone = float((asked.correct & ~now.fell).mean()) if cascade.individual else None
    return told + record.close_part(name, int(tried.sum()), alone)


def _progress(
    cascade: _Cascade,
    record: AutoAttackRecord,
    tried: Bool[np.ndarray, " images"],
    under_way: float,
) -> tuple[str, float, float]:
    """What is told of it, what is done and what is left, in forward passes of an image."""
    costs = {
        name: _forward_passes(name, cascade.ranked.shape[1], s.eot_samples) * s.num_steps * s.rounds
        for name, s in cascade.parts.items()
    }
    names, part = list(costs), record.part
    ended = float((record.now.through & tried).sum()) + under_way
    done = sum(record.reports[name].tried * costs[name] for name in names[:part])
    # What is left is what the images that are still robust have before them.
    later = sum(costs[name] for name in names[part + 1 :])
    left = (tried.sum() - ended) * costs[names[part]] + record.robust.sum() * later
    words = f"{names[part]} ({part + 1}/{len(names)}), robust {record.robust.mean():.1%}"
    return words, done + ended * costs[names[part]], left


def _forward_passes(name: str, wrong_classes: int, eot_samples: int) -> float:
    """What a step costs, roughly; for the time left alone."""
    passes = {"square": 1, "fab-t": 4, "fab": 2 + 2 * wrong_classes}.get(name, 3)
    return passes * max(eot_samples, 1)


def _verify(asked: Asked, name: str, record: AutoAttackRecord) -> list[str]:
    """Looks at what an attack has found once more; images that are not fooled are robust still.

    So the attacks that follow try them, too.
    """
    fooled = np.flatnonzero(record.fooled_by == name)
    bad = fooled[~confirmed(asked, record.adversarial, fooled)] if len(fooled) else fooled
    if not len(bad):
        return []
    record.robust[bad], record.fooled_by[bad], record.now.fell[bad] = True, "", False
    record.adversarial[bad] = asked.images[bad]
    told = (
        f"{len(bad)} adversarial images of {name} did not fool the function when called again "
        "and do not count: its outputs depend on how it is compiled"
    )
    record.warnings.append(told)
    return [told]


def _warn(told: Iterable[str]) -> None:
    """Warns whoever has called what ``autoattack`` returned, three calls from here."""
    for warning in told:
        warnings.warn(warning, stacklevel=4)
