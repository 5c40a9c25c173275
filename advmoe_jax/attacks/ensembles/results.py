"""What an ensemble tells of n images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped


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
        adversarial: like the images; the clean image where no attack succeeded.
        robust: classified correctly under every attack.
        fooled_by: the first attack that succeeded, ``clean`` where the clean image is
            misclassified already, an empty string where the image is robust.
        clean_accuracy: in [0, 1].
        robust_accuracy: in [0, 1].
        attacks: a report per attack, in their order.
        warnings: why the numbers may not mean what they seem to, a sentence each.
    """

    adversarial: Float[np.ndarray, "images ..."]
    robust: Bool[np.ndarray, " images"]
    fooled_by: Shaped[np.ndarray, " images"]
    clean_accuracy: float
    robust_accuracy: float
    attacks: dict[str, AttackReport]
    warnings: tuple[str, ...]


class MoEResult(NamedTuple):
    """The outcome for n images, by two judges.

    Attributes:
        adversarial: like the images; the clean image where no attack succeeded.
        robust: no attack succeeded, by its own judge.
        network_robust: no image that was found fools the network itself; True wherever
            ``robust`` is.
        fooled_by: the first attack that succeeded, ``clean`` where the clean image is
            misclassified already, an empty string where the image is robust.
        clean_accuracy: in [0, 1].
        robust_accuracy: of ``robust``, in [0, 1].
        network_accuracy: of ``network_robust``, in [0, 1].
        attacks: a report per attack, in their order.
        warnings: a sentence each.
    """

    adversarial: Float[np.ndarray, "images ..."]
    robust: Bool[np.ndarray, " images"]
    network_robust: Bool[np.ndarray, " images"]
    fooled_by: Shaped[np.ndarray, " images"]
    clean_accuracy: float
    robust_accuracy: float
    network_accuracy: float
    attacks: dict[str, AttackReport]
    warnings: tuple[str, ...]


class Cost(NamedTuple):
    """What an attack took so far: seconds on the device, those of its first call, and calls."""

    seconds: float = 0.0
    first_call_seconds: float = 0.0
    calls: int = 0

    @classmethod
    def of(cls, numbers: Float[np.ndarray, "3"]) -> "Cost":
        """The cost that was kept as an array."""
        seconds, first, calls = numbers.tolist()
        return cls(seconds, first, int(calls))

    def after(self, seconds: float) -> "Cost":
        """The cost after one more call."""
        first = self.first_call_seconds if self.calls else seconds
        return Cost(self.seconds + seconds, first, self.calls + 1)
