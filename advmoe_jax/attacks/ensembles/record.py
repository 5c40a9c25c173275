"""How far AutoAttack is: all that its state file holds."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

from advmoe_jax.attacks.ensembles.packing import Outcome, Slots
from advmoe_jax.attacks.ensembles.results import AttackReport, AutoAttackResult, Cost
from advmoe_jax.attacks.ensembles.runner import Asked, first_to_fool
from advmoe_jax.parallel import whole


@dataclass
class UnderWay:
    """Of the attack that runs now.

    Attributes:
        through: images that it is done with.
        fell: of them, those that it fooled.
        flat: how many began where the loss has no gradient.
        cost: of its calls so far.
        slots: what is on the device; None before its first call.
    """

    through: Bool[np.ndarray, " images"]
    fell: Bool[np.ndarray, " images"]
    flat: int = 0
    cost: Cost = field(default_factory=Cost)
    slots: Slots | None = None

    @classmethod
    def begin(cls, images: int) -> "UnderWay":
        """Before its first call."""
        return cls(np.zeros(images, bool), np.zeros(images, bool))


@dataclass
class AutoAttackRecord:
    """What the attacks have found so far.

    Attributes:
        part: the number of the attack that runs now.
        robust: classified correctly under every attack so far.
        fooled_by: the first attack that succeeded, as in ``AutoAttackResult``.
        adversarial: what it found.
        now: of the attack that runs now.
        reports: of those before it.
        warnings: so far.
    """

    part: int
    robust: Bool[np.ndarray, " images"]
    fooled_by: Shaped[np.ndarray, " images"]
    adversarial: Float[np.ndarray, "images ..."]
    now: UnderWay
    reports: dict[str, AttackReport] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, asked: Asked) -> "AutoAttackRecord":
        """Before the first attack."""
        names, now = first_to_fool(asked.correct), UnderWay.begin(len(asked.images))
        return cls(0, asked.correct, names, asked.images.copy(), now)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for the state file."""
        arrays = {
            "part": np.array(self.part),
            "robust": self.robust,
            "fooled_by": self.fooled_by,
            "adversarial": self.adversarial,
            "through": self.now.through,
            "fell": self.now.fell,
            "flat": np.array(self.now.flat),
            "cost": np.array(self.now.cost),
            "reports": np.array(json.dumps(self.reports)),
            "warnings": np.array(json.dumps(self.warnings)),
        }
        leaves = jax.tree.leaves(self.now.slots)
        return arrays | {f"slots{i}": whole(leaf) for i, leaf in enumerate(leaves)}

    @classmethod
    def restore(
        cls, arrays: dict[str, np.ndarray], empty: Callable[[int, int], Slots]
    ) -> "AutoAttackRecord":
        """The record that ``arrays`` were made of.

        Args:
            arrays: as the state file holds them.
            empty: (part, size) -> slots of that attack, for their structure.
        """
        part, slots = int(arrays["part"]), None
        if "slots0" in arrays:
            structure = jax.tree.structure(empty(part, len(arrays["slots0"])))
            leaves = [arrays[f"slots{i}"] for i in range(structure.num_leaves)]
            slots = jax.tree.unflatten(structure, leaves)
        cost = Cost.of(arrays["cost"])
        reports = json.loads(str(arrays["reports"]))
        return cls(
            part,
            arrays["robust"],
            arrays["fooled_by"],
            arrays["adversarial"],
            UnderWay(arrays["through"], arrays["fell"], int(arrays["flat"]), cost, slots),
            {name: AttackReport(*report) for name, report in reports.items()},
            json.loads(str(arrays["warnings"])),
        )

    def note(self, name: str, outcome: Outcome) -> None:
        """Takes in what one call of the device found."""
        now, fallen = self.now, outcome.image[outcome.fooled]
        now.through[outcome.image] = True
        now.fell[fallen] = True
        now.flat += outcome.flat
        now.cost = now.cost.after(outcome.seconds)
        now.slots = outcome.slots
        first = outcome.fooled & self.robust[outcome.image]
        self.adversarial[outcome.image[first]] = outcome.adversarial[first]
        self.fooled_by[outcome.image[first]] = name
        self.robust[fallen] = False

    def close_part(self, name: str, tried: int, alone: float | None) -> list[str]:
        """Ends the attack that runs now; returns what is suspicious about it.

        Args:
            name: of the attack.
            tried: images it ran on.
            alone: robust accuracy under it alone, or None.
        """
        now, accuracy, told = self.now, float(self.robust.mean()), []
        before = min((report.accuracy for report in self.reports.values()), default=None)
        fell = int(now.fell.sum())
        self.reports[name] = AttackReport(tried, fell, accuracy, alone, *now.cost)
        if now.flat:
            told.append(
                f"{now.flat} of {tried} images have no gradient in {name}: attacks that follow "
                "the gradient are unreliable on this function"
            )
        if name == "square" and before is not None and before - accuracy > 0.002:
            told.append(
                f"Square lowered the robust accuracy from {before:.1%} to {accuracy:.1%}: the "
                "function masks its gradients; try more queries, or an attack made for it"
            )
        self.part, self.now = self.part + 1, UnderWay.begin(len(self.robust))
        self.warnings += told
        return told

    def result(self, asked: Asked) -> AutoAttackResult:
        """The outcome, when every attack is done."""
        return AutoAttackResult(
            self.adversarial,
            self.robust,
            self.fooled_by,
            float(asked.correct.mean()),
            float(self.robust.mean()),
            self.reports,
            tuple(self.warnings),
        )
