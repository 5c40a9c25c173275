"""The suite of attacks for a mixture of experts: robust accuracy as the minimum over all of them.

``routed``, ``gate`` and ``pathways`` say what each attack does. The suite runs them one after the
other, each on the images that are still robust, as AutoAttack does with its own.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from advmoe_jax.attacks.constraints import Threat
from advmoe_jax.attacks.ensembles.autoattack import autoattack
from advmoe_jax.attacks.ensembles.progress import Bar
from advmoe_jax.attacks.ensembles.results import AttackReport, Cost, MoEResult
from advmoe_jax.attacks.ensembles.runner import (
    Asked,
    Saved,
    ask,
    confirmed,
    first_to_fool,
    go_on,
)
from advmoe_jax.attacks.gate import gate_steps
from advmoe_jax.attacks.pathways import Pathways, worst_pathway
from advmoe_jax.attacks.pgd import per_image_keys
from advmoe_jax.attacks.routed import Routed, joint_steps, route_steps
from advmoe_jax.parallel import whole
from advmoe_jax.storage import path_of
from advmoe_jax.types import Array

FROZEN, WORST = "frozen_route", "worst_pathway"


def moe_suite(
    threat: Threat,
    *,
    num_steps: int = 100,
    search_steps: int = 20,
    restarts: int = 1,
    eot_samples: int = 4,
) -> Callable[..., MoEResult]:
    """All attacks on a routed function; returns a function that is called as AutoAttack's is::

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
        individual: bool = False,
        state_file: str | Path | None = None,
        **settings: Any,
    ) -> MoEResult:
        """See ``AutoAttack``'s; ``individual`` is of the four attacks that the network judges."""
        keys = per_image_keys(key, len(images))
        first = of_network(
            function,
            images,
            labels,
            keys,
            individual=individual,
            state_file=_beside(state_file, "1"),
            **settings,
        )
        second = of_pathways(
            function,
            images,
            labels,
            keys,
            state_file=_beside(state_file, "2"),
            attacked=first.robust,
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
    samples: int = 0,
) -> Callable[..., MoEResult]:
    """``worst_pathway`` over any number of images; returns a function called as AutoAttack's is.

    ``robust`` is judged by the pathways, held fixed (``frozen``: by the clean image's alone);
    ``network_robust`` by the network. The attacks reported are ``frozen_route``, the clean image's
    pathway, and ``worst_pathway``, all others within reach, or a sample of them.
    """
    searched = {"search_steps": search_steps, "samples": samples, "frozen": frozen}
    attack = worst_pathway(threat, num_steps=num_steps, restarts=restarts, **searched)
    names = (FROZEN,) if frozen else (FROZEN, WORST)

    def run(
        function: Routed,
        images: Array,
        labels: Array,
        key: Array,
        *,
        batch_size: int = 128,
        state_file: str | Path | None = None,
        progress: bool = True,
        mesh: Mesh | None = None,
        attacked: Bool[np.ndarray, " images"] | None = None,
        pause: Callable[[], None] = go_on,
    ) -> MoEResult:
        """See ``autoattack``'s; ``attacked``: which images to attack, all by default."""
        asked = ask(threat, function, images, labels, key, batch_size=batch_size, mesh=mesh)
        correct = asked.correct
        chosen = np.flatnonzero(correct if attacked is None else correct & attacked)
        settings = (num_steps, search_steps, restarts, frozen, samples)
        saved = Saved(asked, state_file, *settings, chosen)
        before = saved.load()
        record = _Record.begin(asked) if before is None else _Record(**before)
        with Bar(progress) as bar:

            def note(call: _Call) -> None:
                record.note(call)
                done, robust = len(record.fooled), float((~record.fooled.any(axis=1)).mean())
                bar.show(f"pathways, robust {robust:.1%} of them", done, len(chosen) - done)

            body = _AttackPathways(attack, asked.impl)
            calls = _calls(asked, body, chosen, len(record.fooled))
            saved.carry_out(calls, note, record, pause)
        saved.save(record)
        return _result(asked, chosen, record, names)

    return run


class _AttackPathways(NamedTuple):
    """A body: (function, (images, labels, key data)) -> ``Pathways``."""

    attack: Callable[..., Pathways]
    impl: str

    def __call__(self, function: Routed, rows: tuple[Array, Array, Array]) -> Pathways:
        """What runs on the device."""
        images, labels, keys = rows
        return self.attack(function, images, labels, jax.random.wrap_key_data(keys, impl=self.impl))


class _Call(NamedTuple):
    """What one call of the device found of the next images, and the seconds it took."""

    found: Pathways
    seconds: float


@dataclass
class _Record:
    """Of the images attacked so far: as in ``Pathways``, and what it cost as in ``Cost``."""

    adversarial: Float[np.ndarray, "done ..."]
    fooled: Bool[np.ndarray, "done routes"]
    network_fooled: Bool[np.ndarray, " done"]
    cost: Float[np.ndarray, "3"]

    @classmethod
    def begin(cls, asked: Asked) -> "_Record":
        """Before the first call."""
        none = np.zeros((0, 1), bool), np.zeros(0, bool)
        return cls(asked.images[:0], *none, np.array(Cost()))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for the state file."""
        return vars(self)

    def note(self, call: _Call) -> None:
        """Takes in what one call of the device found."""
        for name in ("adversarial", "fooled", "network_fooled"):
            before, found = getattr(self, name), getattr(call.found, name)
            setattr(self, name, np.concatenate([before, found]) if len(before) else found)
        self.cost = np.array(Cost.of(self.cost).after(call.seconds))


def _calls(
    asked: Asked, body: _AttackPathways, chosen: Int[np.ndarray, " chosen"], done: int
) -> Iterator[_Call]:
    """Attacks the chosen images from number ``done`` on, a batch per call of the device."""
    size, keys = asked.size_for(len(chosen)), asked.key_data(WORST)
    for begin in range(done, len(chosen), size):
        at = chosen[np.minimum(np.arange(begin, begin + size), len(chosen) - 1)]
        began = time.perf_counter()
        rows = asked.images[at], asked.labels[at], keys[at]
        found = whole(asked.device.run(body, rows))
        seconds = time.perf_counter() - began
        some = min(size, len(chosen) - begin)
        yield _Call(jax.tree.map(lambda a, some=some: a[:some], found), seconds)


def _result(
    asked: Asked, chosen: Int[np.ndarray, " chosen"], found: _Record, names: tuple[str, ...]
) -> MoEResult:
    correct = asked.correct
    robust, network = np.zeros_like(correct), correct.copy()
    fooled_by = first_to_fool(correct)
    adversarial = asked.images.copy()
    adversarial[chosen] = found.adversarial
    claimed = chosen[found.network_fooled]
    if len(claimed):  # by the function as it was given, outside of what was compiled
        network[claimed[confirmed(asked, adversarial, claimed)]] = False
    # An image that fools the network fools the pathway the network takes, whichever it is.
    lost = found.fooled.any(axis=1) | ~network[chosen]
    robust[chosen] = ~lost
    fooled_by[chosen[lost]] = names[-1]
    fooled_by[chosen[found.fooled[:, 0]]] = FROZEN
    left, accuracy, reports = len(chosen), len(chosen) / len(correct), {}
    for name in names:
        fallen = int(np.sum(fooled_by == name))
        accuracy -= fallen / len(correct)
        # Both come from the same calls.
        own = Cost.of(found.cost) if name == names[-1] else Cost()
        reports[name] = AttackReport(left, fallen, accuracy, None, *own)
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
        asked.warnings,
    )


def _where(flags: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(flags.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _beside(path: str | Path | None, suffix: str) -> Path | None:
    path = None if path is None else path_of(path)
    return path and path.with_suffix(f".{suffix}{path.suffix}")
