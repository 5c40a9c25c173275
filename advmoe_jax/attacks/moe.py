"""The suite of attacks for a mixture of experts: robust accuracy as the minimum over all of them.

``routing`` says what each attack does. The suite runs them one after the other, each on the images
that are still robust, as AutoAttack does with its own.
"""

import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from advmoe_jax.attacks import resume
from advmoe_jax.attacks.autoattack import AttackReport, autoattack
from advmoe_jax.attacks.checks import check_images, check_logits
from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.packing import (
    Compile,
    as_partial,
    confirmed,
    in_batches,
    shared,
    size_for,
)
from advmoe_jax.attacks.pgd import per_image_keys
from advmoe_jax.attacks.progress import progress_bar
from advmoe_jax.attacks.routing import (
    Pathways,
    Routed,
    gate_steps,
    joint_steps,
    route_steps,
    worst_pathway,
)

Array = jax.Array
FROZEN, WORST = "frozen_route", "worst_pathway"


class MoEResult(NamedTuple):
    """The outcome for n images.

    Attributes:
        adversarial: [n, ...] like the images; the clean image where no attack succeeded.
        robust: bool [n], no attack succeeded, by its own judge.
        network_robust: bool [n], no image that was found fools the network itself; True wherever
            ``robust`` is.
        fooled_by: str [n]: the first attack that succeeded, ``clean`` where the clean image is
            misclassified already, an empty string where the image is robust.
        clean_accuracy: in [0, 1].
        robust_accuracy: of ``robust``, in [0, 1].
        network_accuracy: of ``network_robust``, in [0, 1].
        attacks: a report per attack, in their order.
        warnings: a sentence each.
    """

    adversarial: np.ndarray
    robust: np.ndarray
    network_robust: np.ndarray
    fooled_by: np.ndarray
    clean_accuracy: float
    robust_accuracy: float
    network_accuracy: float
    attacks: dict[str, AttackReport]
    warnings: tuple[str, ...]


def moe_suite(
    threat: Threat,
    *,
    num_steps: int = 100,
    search_steps: int = 20,
    restarts: int = 1,
    eot_samples: int = 4,
) -> Callable[..., MoEResult]:
    """All attacks of ``routing``; returns a function that is called as AutoAttack's is::

        result = moe_suite(linf(8 / 255))(routed, images, labels, jax.random.key(0))

    In order: ``route``, ``joint``, ``straight_through``, ``softmax_gate``, which the network itself
    judges; then, on what is left, ``frozen_route`` and ``worst_pathway``, each judged by the
    pathway it holds fixed. ``robust`` is the minimum over all six per image; ``network_robust``
    counts only images that fool the network as it is.

    Args:
        threat: the ball and the pixel range.
        num_steps: of APGD, in every attack.
        search_steps: of ``worst_pathway``'s search for routes.
        restarts: of every attack.
        eot_samples: draws of gate noise per step of the two gate attacks.

    Raises:
        ValueError: if a setting is not valid.
    """
    apgd = {"num_steps": num_steps, "restarts": restarts}
    steps = {
        "route": route_steps(threat, **apgd),
        "joint": joint_steps(threat, **apgd),
        "straight_through": gate_steps(threat, "straight_through", eot_samples=eot_samples, **apgd),
        "softmax_gate": gate_steps(threat, "softmax", eot_samples=eot_samples, **apgd),
    }
    of_network = autoattack(threat, "custom", attacks=steps)
    of_pathways = pathways(threat, search_steps=search_steps, **apgd)

    def run(
        function: Routed,
        images: Array,
        labels: Array,
        key: Array,
        *,
        state_file: str | Path | None = None,
        **settings: Any,
    ) -> MoEResult:
        keys = per_image_keys(key, len(images))
        first = of_network(
            function, images, labels, keys, state_file=_beside(state_file, "1"), **settings
        )
        second = of_pathways(
            function,
            images,
            labels,
            keys,
            state_file=_beside(state_file, "2"),
            asked=first.robust,
            **settings,
        )
        network = second.network_robust & first.robust
        before = first.robust | (first.fooled_by == "clean")
        return second._replace(
            adversarial=_where(before, second.adversarial, first.adversarial),
            network_robust=network,
            network_accuracy=float(network.mean()),
            fooled_by=np.where(before, second.fooled_by, first.fooled_by),
            clean_accuracy=first.clean_accuracy,
            attacks=first.attacks | second.attacks,
            warnings=first.warnings,
        )

    return run


def pathways(
    threat: Threat,
    *,
    num_steps: int = 100,
    search_steps: int = 20,
    restarts: int = 1,
    frozen: bool = False,
) -> Callable[..., MoEResult]:
    """``worst_pathway`` over any number of images; returns a function called as AutoAttack's is.

    ``robust`` is judged by the pathways, held fixed (``frozen``: by the clean image's alone);
    ``network_robust`` by the network. The attacks reported are ``frozen_route``, the clean image's
    pathway, and ``worst_pathway``, all others within reach.
    """
    attack = worst_pathway(
        threat, num_steps=num_steps, search_steps=search_steps, restarts=restarts, frozen=frozen
    )
    words = threat.norm, *map(float, threat[1:]), num_steps, search_steps, restarts, frozen

    @lru_cache(maxsize=8)
    def program(compile: Compile, impl: str) -> Callable[..., Pathways]:
        def on_device(function: Routed, rows: tuple[Array, Array, Array]) -> Pathways:
            keys = jax.random.wrap_key_data(rows[2], impl=impl)
            return attack(function, rows[0], rows[1], keys)

        return compile(on_device)

    def run(
        function: Routed,
        images: Array,
        labels: Array,
        key: Array,
        *,
        batch_size: int = 128,
        state_file: str | Path | None = None,
        progress: bool = True,
        compile: Compile = jax.jit,
        batch_multiple: int = 1,
        asked: np.ndarray | None = None,
    ) -> MoEResult:
        """See ``autoattack``'s; ``asked`` bool [n]: images to attack, all by default."""
        check_images(threat, images, labels)
        if batch_size < 1 or batch_size % batch_multiple:
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of {batch_multiple}"
            )
        images, labels = np.asarray(images), np.asarray(labels, np.int32)
        keys = fold_in(per_image_keys(key, len(images)), zlib.crc32(WORST.encode()))
        impl, function = str(jax.random.key_impl(keys)), as_partial(function)
        keys = np.asarray(jax.random.key_data(keys))
        compiled = shared(program, function)(compile, impl)
        logits = in_batches(function, (images,), batch_size)
        told = check_logits(logits, labels)
        correct = np.argmax(logits, axis=1) == labels
        chosen = np.flatnonzero(correct if asked is None else correct & asked)
        size = size_for(len(chosen), batch_size, batch_multiple)
        owner = resume.fingerprint([words, size, chosen, images, labels, keys])
        found = _attack_in_batches(
            lambda *rows: compiled(function, rows),
            (images, labels, keys),
            chosen,
            size,
            state_file,
            owner,
            progress,
        )
        return _result(threat, function, images, labels, correct, chosen, found, size, frozen, told)

    return run


class _Found(NamedTuple):
    """Of the m images attacked: as in ``Pathways``, and what it cost."""

    adversarial: np.ndarray
    fooled: np.ndarray
    network_fooled: np.ndarray
    seconds: np.ndarray  # all, the first call's, and the number of calls


def _attack_in_batches(
    compiled: Callable[..., Pathways],
    arrays: tuple[np.ndarray, ...],
    chosen: np.ndarray,
    size: int,
    state_file: str | Path | None,
    owner: str,
    progress: bool,
) -> _Found:
    """All images of ``chosen``, saved after every batch."""
    saved = resume.load(state_file, owner) if state_file is not None else None
    parts = [_Found(*(saved[name] for name in _Found._fields))] if saved else []
    done = len(parts[0].adversarial) if parts else 0
    images = arrays[0]
    with progress_bar(progress) as bar:
        for begin in range(done, len(chosen), size):
            at = chosen[np.minimum(np.arange(begin, begin + size), len(chosen) - 1)]
            began = time.perf_counter()
            batch = jax.tree.map(np.asarray, compiled(*(a[at] for a in arrays)))
            seconds = time.perf_counter() - began
            rows = min(size, len(chosen) - begin)
            cost = np.array([seconds, 0 if parts else seconds, 1])
            found = batch.adversarial[:rows], batch.fooled[:rows], batch.network_fooled[:rows]
            parts = [_joined([*parts, _Found(*found, cost)])]
            if state_file is not None:
                resume.save(state_file, parts[0]._asdict(), owner)
            if bar is not None:
                robust = float((~parts[0].fooled.any(axis=1)).mean())
                words = f"pathways, robust {robust:.1%} of them"
                bar.update(bar.task, description=words, completed=begin + rows, total=len(chosen))
    nothing = _Found(images[:0], np.zeros((0, 1), bool), np.zeros(0, bool), np.zeros(3))
    return parts[0] if parts else nothing


def _joined(parts: list[_Found]) -> _Found:
    rows = [np.concatenate([getattr(p, name) for p in parts]) for name in _Found._fields[:-1]]
    return _Found(*rows, sum(p.seconds for p in parts))


def _result(
    threat: Threat,
    function: Routed,
    images: np.ndarray,
    labels: np.ndarray,
    correct: np.ndarray,
    chosen: np.ndarray,
    found: _Found,
    size: int,
    frozen: bool,
    told: list[str],
) -> MoEResult:
    robust, network = np.zeros_like(correct), correct.copy()
    fooled_by = np.where(correct, "", "clean").astype("<U64")
    adversarial = images.copy()
    adversarial[chosen] = found.adversarial
    of_clean, of_any = found.fooled[:, 0], found.fooled.any(axis=1)
    claimed = chosen[found.network_fooled]
    if len(claimed):  # by the function as it was given, outside of what was compiled
        real = confirmed(
            threat, function, adversarial[claimed], images[claimed], labels[claimed], size
        )
        network[claimed[real]] = False
    # An image that fools the network fools the pathway the network takes, whichever it is.
    lost = of_any | ~network[chosen]
    robust[chosen] = ~lost
    fooled_by[chosen[lost]] = FROZEN if frozen else WORST
    fooled_by[chosen[of_clean]] = FROZEN
    seconds, first, calls = found.seconds
    names = [FROZEN] if frozen else [FROZEN, WORST]
    left, accuracy, reports = len(chosen), len(chosen) / len(images), {}
    for name in names:
        fallen = int(np.sum(fooled_by == name))
        accuracy -= fallen / len(images)
        own = name == names[-1]  # both come from the same calls
        cost = (float(seconds), float(first), int(calls)) if own else (0.0, 0.0, 0)
        reports[name] = AttackReport(left, fallen, accuracy, None, *cost)
        left -= fallen
    return MoEResult(
        adversarial,
        robust,
        network,
        fooled_by,
        float(correct.mean()),
        float(robust.mean()),
        float(network.mean()),
        reports,
        tuple(told),
    )


def _where(flags: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(flags.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _beside(path: str | Path | None, suffix: str) -> Path | None:
    return None if path is None else Path(path).with_suffix(f".{suffix}{Path(path).suffix}")
