"""AutoAttack: the ensemble by which robust accuracy is reported.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020. Each attack runs only on the images that are still classified
correctly; the batches are re-packed while it runs (``packing``).
"""

import json
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from advmoe_jax.attacks import resume
from advmoe_jax.attacks.apgd import apgd_steps
from advmoe_jax.attacks.checks import check_deterministic, check_images, check_logits
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.expectation import fold_in, mean_outputs
from advmoe_jax.attacks.fab import fab_steps
from advmoe_jax.attacks.packing import (
    Compile,
    Slots,
    Task,
    as_partial,
    attack_packed,
    confirmed,
    device_function,
    empty,
    in_batches,
    shared,
    size_for,
)
from advmoe_jax.attacks.pgd import per_image_keys
from advmoe_jax.attacks.progress import progress_bar
from advmoe_jax.attacks.square import square_steps
from advmoe_jax.attacks.stepwise import Stepwise, check_classes

Array = jax.Array
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# Calls of the device per round: often enough to send fooled images away, and to save.
CALLS = 10
LONGEST_CALL = 100


class AttackReport(NamedTuple):
    """What one attack of the ensemble did.

    Attributes:
        tried: images it ran on.
        fooled: images of those it fooled.
        accuracy: robust accuracy after it, in [0, 1]: of all attacks so far together.
        alone: robust accuracy under this attack alone; None unless ``individual``.
        seconds: time on the device, compilation included.
        first_call_seconds: of it, the first call with its compilation.
        calls: calls of the device.
    """

    tried: int
    fooled: int
    accuracy: float
    alone: float | None
    seconds: float
    first_call_seconds: float
    calls: int


class AutoAttackResult(NamedTuple):
    """The outcome for n images.

    Attributes:
        adversarial: [n, ...] like the images; the clean image where no attack succeeded.
        robust: bool [n], classified correctly under every attack.
        fooled_by: str [n]: the first attack that succeeded, ``clean`` where the clean image is
            misclassified already, an empty string where the image is robust.
        clean_accuracy: in [0, 1].
        robust_accuracy: in [0, 1].
        attacks: a report per attack, in their order.
        warnings: why the numbers may not mean what they seem to, a sentence each.
    """

    adversarial: np.ndarray
    robust: np.ndarray
    fooled_by: np.ndarray
    clean_accuracy: float
    robust_accuracy: float
    attacks: dict[str, AttackReport]
    warnings: tuple[str, ...]


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
) -> Callable[..., AutoAttackResult]:
    """AutoAttack on a threat model; returns the function described in ``run`` below::

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
            there are.
        restarts: of APGD-CE, APGD-DLR and FAB; default 1, in ``plus`` and in l1 5.
        eot_samples: draws a step averages over; default 20 for ``rand``, else 0.

    Raises:
        ValueError: if a setting is not valid.
    """
    names = _names(threat, version, attacks)
    eot = (20 if version == "rand" else 0) if eot_samples is None else eot_samples
    if eot and not all(name.startswith("apgd") for name in names):
        raise ValueError("a randomised function is attacked by apgd-ce, apgd-dlr and apgd-t alone")

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
            apgd = {"num_steps": num_steps, "eot_samples": eot}
            parts[name] = {
                "apgd-ce": lambda t=tries, a=apgd: apgd_steps(threat, restarts=t, **a),
                "apgd-dlr": lambda t=tries, a=apgd: apgd_steps(threat, loss="dlr", restarts=t, **a),
                "apgd-t": lambda t=targets, a=apgd: apgd_steps(
                    threat, loss="dlr_targeted", num_targets=t, **a
                ),
                "fab": lambda t=tries: fab_steps(threat, num_steps=num_steps, restarts=t),
                "fab-t": lambda t=targets: fab_steps(
                    threat, num_steps=num_steps, targeted=True, num_targets=t
                ),
                "square": lambda: square_steps(threat, num_queries=num_queries),
            }[name]()
        return parts

    plan(10)  # wrong settings are refused here, not after the first hour

    def run(
        function: Callable[..., Array],
        images: Array,
        labels: Array,
        key: Array,
        *,
        batch_size: int = 128,
        individual: bool = False,
        state_file: str | Path | None = None,
        progress: bool = True,
        compile: Compile = jax.jit,
        batch_multiple: int = 1,
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
            key: one PRNG key, or one per image.
            batch_size: images attacked at once; fewer where that leaves no slot empty.
            individual: every attack runs on all images that are classified correctly, so that
                each one's own robust accuracy is known; costs more.
            state_file: where the state is kept after every batch; the same call goes on from
                there, with the same result.
            progress: whether to show a bar with the time left.
            compile: makes (function, rows) -> rows a program; every array of the rows has
                the image as its first axis, so ``lambda f: jax.jit(jax.shard_map(f, mesh=mesh,
                in_specs=(P(), P("data")), out_specs=P("data")))`` uses several devices.
            batch_multiple: what batch sizes must be multiples of, such as the devices.

        Raises:
            ValueError: if images, labels or the function's outputs make no sense, or the state
                file is damaged or of another evaluation.
        """
        evaluation = _Evaluation(
            threat, plan, as_partial(function), eot, batch_size, batch_multiple, compile, individual
        )
        return evaluation.run(images, labels, key, state_file, progress)

    return run


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


# Cached for functions that may share them, see ``packing.shared``.
@lru_cache(maxsize=32)
def _compiled_steps(compile: Compile, steps: Stepwise, impl: str) -> Callable[[Any, Any], Any]:
    chunk = min(-(-steps.num_steps // CALLS), LONGEST_CALL)
    return compile(device_function(steps, chunk, impl))


@lru_cache(maxsize=8)
def _compiled_outputs(compile: Compile, eot_samples: int, impl: str) -> Callable[[Any, Any], Any]:
    def outputs(function: Any, rows: tuple[Array, Array]) -> Array:
        keys = jax.random.wrap_key_data(rows[1], impl=impl)
        return mean_outputs(function, rows[0], keys, eot_samples)

    return compile(outputs)


class _Evaluation:
    """One call of AutoAttack: what is asked, and the record of it that the state file holds."""

    def __init__(
        self,
        threat: Threat,
        plan: Callable[[int], dict[str, Stepwise]],
        function: Any,
        eot_samples: int,
        batch_size: int,
        batch_multiple: int,
        compile: Compile,
        individual: bool,
    ) -> None:
        if batch_size < 1 or batch_size % batch_multiple:
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of {batch_multiple}"
            )
        self.threat, self.plan, self.function = threat, plan, function
        self.eot_samples, self.batch_size, self.multiple = eot_samples, batch_size, batch_multiple
        self.compile, self.individual = compile, individual

    def run(
        self, images: Array, labels: Array, key: Array, state_file: Any, progress: bool
    ) -> AutoAttackResult:
        check_images(self.threat, images, labels)
        self.images, self.labels = np.asarray(images), np.asarray(labels, np.int32)
        keys = per_image_keys(key, len(self.images))
        self.impl, self.keys = str(jax.random.key_impl(keys)), keys
        logits = self._clean_logits()
        self.warnings = check_logits(logits, self.labels)
        if not self.eot_samples:
            self.warnings += self._check_deterministic()
        self.parts = self.plan(logits.shape[1])
        for steps in self.parts.values():
            check_classes(steps, logits.shape[1])
        for warning in self.warnings:
            warnings.warn(warning, stacklevel=3)
        right = np.eye(logits.shape[1], dtype=bool)[self.labels]
        order = np.argsort(np.where(right, np.inf, -logits.astype(np.float32)), 1, kind="stable")
        self.ranked = order[:, :-1].astype(np.int32)
        self.correct = np.argmax(logits, axis=1) == self.labels
        self.state_file, self.saved_at, self.saving_took = state_file, 0.0, 0.0
        self._begin_record()
        self._resume(logits)
        with progress_bar(progress) as bar:
            for number, name in enumerate(self.parts):
                if number >= self.part:
                    self._attack(number, name, bar)
        return self._result()

    # ------------------------------------------------------------------ clean images

    def _clean_logits(self) -> np.ndarray:
        program = shared(_compiled_outputs, self.function)
        compiled = program(self.compile, self.eot_samples, self.impl)
        rows = self.images, np.asarray(jax.random.key_data(self.keys))
        return in_batches(lambda *r: compiled(self.function, r), rows, self.batch_size)

    def _check_deterministic(self) -> list[str]:
        first = self.images[: self.batch_size]
        return check_deterministic(*(np.asarray(self.function(first)) for _ in range(2)))

    # ------------------------------------------------------------------ the record

    def _begin_record(self) -> None:
        self.part = 0
        self.robust = self.correct.copy()
        self.fooled_by = np.where(self.correct, "", "clean").astype("<U64")
        self.adversarial = self.images.copy()
        self.reports: dict[str, AttackReport] = {}
        self._begin_part()

    def _begin_part(self) -> None:
        # Of the attack under way: who is through, who fell, what it cost, and what is in work.
        self.through = np.zeros(len(self.images), bool)
        self.fell = np.zeros(len(self.images), bool)
        self.spent = np.zeros(3)
        self.flat = 0
        self.slots: Slots | None = None

    def _owner(self) -> str:
        settings = [
            (name, s.num_steps, s.restarts, s.num_targets) for name, s in self.parts.items()
        ]
        threat = (self.threat.norm, *(float(v) for v in self.threat[1:]))
        keys = np.asarray(jax.random.key_data(self.keys))
        asked = threat, settings, self.eot_samples, self.batch_size, self.individual
        return resume.fingerprint([asked, self.images, self.labels, keys])

    def _save(self, now: bool = False) -> None:
        # Of a large evaluation the file is large: at most a twentieth of the time goes there.
        if self.state_file is None:
            return
        if not now and time.perf_counter() - self.saved_at < 20 * self.saving_took:
            return
        began = time.perf_counter()
        arrays = {
            "part": np.array(self.part),
            "robust": self.robust,
            "fooled_by": self.fooled_by,
            "adversarial": self.adversarial,
            "through": self.through,
            "fell": self.fell,
            "spent": self.spent,
            "flat": np.array(self.flat),
            "logits": self.logits,
            "reports": np.array(json.dumps({k: list(v) for k, v in self.reports.items()})),
            "warnings": np.array(json.dumps(self.warnings)),
        }
        if self.slots is not None:
            leaves = jax.tree.leaves(self.slots)
            arrays |= {f"slots{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
        resume.save(self.state_file, arrays, self._owner())
        self.saved_at = time.perf_counter()
        self.saving_took = self.saved_at - began

    def _resume(self, logits: np.ndarray) -> None:
        self.logits = logits
        if self.state_file is None:
            return
        saved = resume.load(self.state_file, self._owner())
        if saved is None:
            return
        scale = float(np.max(np.abs(logits))) + 1e-6
        if not np.allclose(saved["logits"], logits, rtol=1e-2, atol=1e-2 * scale):
            raise ValueError(
                f"state file {self.state_file} is of another function (its clean logits differ): "
                "delete it to start again, or give another"
            )
        for name in ("robust", "fooled_by", "adversarial", "through", "fell", "spent"):
            setattr(self, name, saved[name])
        self.part, self.flat = int(saved["part"]), int(saved["flat"])
        reports = json.loads(str(saved["reports"]))
        self.reports = {name: AttackReport(*report) for name, report in reports.items()}
        self.warnings = json.loads(str(saved["warnings"]))
        if "slots0" in saved:
            steps = list(self.parts.values())[self.part]
            kind = empty(steps, self._task(self.part), len(saved["slots0"]), self.impl)
            leaves = [saved[f"slots{i}"] for i in range(len(jax.tree.leaves(kind)))]
            self.slots = jax.tree.unflatten(jax.tree.structure(kind), leaves)

    # ------------------------------------------------------------------ the attacks

    def _task(self, number: int) -> Task:
        # By name, so that an attack draws the same whatever runs before it.
        name = list(self.parts)[number]
        keys = fold_in(self.keys, zlib.crc32(name.encode()))
        return Task(self.images, self.labels, self.ranked, np.asarray(jax.random.key_data(keys)))

    def _attack(self, number: int, name: str, bar: Any) -> None:
        steps, task = self.parts[name], self._task(number)
        asked = self.correct if self.individual else self.robust | self.fell
        waiting = asked & ~self.through
        size = size_for(int(asked.sum()), self.batch_size, self.multiple)
        slots = empty(steps, task, size, self.impl) if self.slots is None else self.slots
        waiting[slots.image[slots.image >= 0]] = False
        compiled = shared(_compiled_steps, self.function)(self.compile, steps, self.impl)
        queue = np.flatnonzero(waiting)
        for outcome in attack_packed(steps, compiled, self.function, task, queue, slots):
            self._note(name, outcome)
            self._show(bar, number, name, asked, outcome.progress)
            self._save()
        tried = int(asked.sum())
        self.reports[name] = AttackReport(
            tried,
            int(self.fell.sum()),
            float(self.robust.mean()),
            float((self.correct & ~self.fell).mean()) if self.individual else None,
            float(self.spent[0]),
            float(self.spent[1]),
            int(self.spent[2]),
        )
        if self.flat:
            self._warn(
                f"{self.flat} of {tried} images have no gradient in {name}: attacks that follow "
                "the gradient are unreliable on this function"
            )
        before = min([r.accuracy for r in self.reports.values()][:-1], default=None)
        if name == "square" and before is not None and before - self.robust.mean() > 0.002:
            self._warn(
                f"Square lowered the robust accuracy from {before:.1%} to "
                f"{self.robust.mean():.1%}: the function masks its gradients; "
                "try more queries, or an attack made for it"
            )
        self.part = number + 1
        self._begin_part()
        self._save(now=True)

    def _note(self, name: str, outcome: Any) -> None:
        self.through[outcome.image] = True
        fallen = outcome.image[outcome.fooled]
        self.fell[fallen] = True
        first = outcome.fooled & self.robust[outcome.image]
        self.adversarial[outcome.image[first]] = outcome.adversarial[first]
        self.fooled_by[outcome.image[first]] = name
        self.robust[fallen] = False
        self.flat += outcome.flat
        self.spent += [outcome.seconds, 0 if self.spent[2] else outcome.seconds, 1]
        self.slots = outcome.slots

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        warnings.warn(warning, stacklevel=5)

    def _show(self, bar: Any, number: int, name: str, asked: np.ndarray, under_way: float) -> None:
        if bar is None:
            return
        parts = list(self.parts.items())
        work = [
            _forward_passes(n, self.ranked.shape[1], s.eot_samples) * s.num_steps * s.rounds
            for n, s in parts
        ]
        # What is done, and what the images that are still robust have before them.
        ended = (self.through & asked).sum() + under_way
        remaining = (asked.sum() - ended) * work[number] + self.robust.sum() * sum(
            work[number + 1 :]
        )
        bar.work += max(ended - bar.ended if number == bar.number else ended, 0) * work[number]
        bar.number, bar.ended = number, ended
        words = f"{name} ({number + 1}/{len(parts)}), robust {self.robust.mean():.1%}"
        bar.update(bar.task, description=words, completed=bar.work, total=bar.work + remaining)

    # ------------------------------------------------------------------ the result

    def _result(self) -> AutoAttackResult:
        if not self.eot_samples:
            self._verify()
        return AutoAttackResult(
            self.adversarial,
            self.robust,
            self.fooled_by,
            float(self.correct.mean()),
            float(self.robust.mean()),
            self.reports,
            tuple(self.warnings),
        )

    def _verify(self) -> None:
        """Looks at every adversarial image once more, by the function as it was given."""
        fooled = np.flatnonzero(self.correct & ~self.robust)
        if not len(fooled):
            return
        size = size_for(len(fooled), self.batch_size, self.multiple)
        images, clean = self.adversarial[fooled], self.images[fooled]
        labels = self.labels[fooled]
        valid = confirmed(self.threat, self.function, images, clean, labels, size)
        if not valid.all():
            bad = fooled[~valid]
            self.robust[bad], self.fooled_by[bad] = True, ""
            self.adversarial[bad] = self.images[bad]
            self._warn(
                f"{len(bad)} adversarial images did not fool the function when called again and "
                "count as robust: its outputs depend on how it is compiled"
            )


def _forward_passes(name: str, wrong_classes: int, eot_samples: int) -> float:
    """What a step costs, roughly; for the time left alone."""
    passes = {"square": 1, "fab-t": 4, "fab": 2 + 2 * wrong_classes}.get(name, 3)
    return passes * max(eot_samples, 1)
