"""What every ensemble shares: what it is asked, its state in a file, and a second look.

An ensemble asks (``ask``), makes a record of what it has done or finds it in a file (``Saved``),
calls the device again and again (``carry_out``), and confirms what it has found (``confirmed``).
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int, UInt32

from advmoe_jax.attacks.constraints import Threat, distance
from advmoe_jax.attacks.ensembles.checks import check_input, check_logits
from advmoe_jax.attacks.ensembles.programs import (
    Device,
    Outputs,
    device_for,
    in_batches,
    size_for,
)
from advmoe_jax.attacks.expectation import fold_in
from advmoe_jax.attacks.pgd import per_image_keys
from advmoe_jax.files import StateFile, fingerprint
from advmoe_jax.parallel import first_says
from advmoe_jax.types import Array

Outcome = TypeVar("Outcome")


class Asked(NamedTuple):
    """What one call of an ensemble is asked, and what the function says of the clean images.

    Attributes:
        threat: the ball and the pixel range.
        device: the function, and where it is attacked.
        images: in the pixel range.
        labels: of the images.
        keys: a PRNG key per image.
        batch_size: the most images attacked at once.
        logits: of the clean images.
        warnings: what is suspicious about them, a sentence each.
    """

    threat: Threat
    device: Device
    images: Float[np.ndarray, "images ..."]
    labels: Int[np.ndarray, " images"]
    keys: Array
    batch_size: int
    logits: Float[np.ndarray, "images classes"]
    warnings: tuple[str, ...]

    @property
    def correct(self) -> Bool[np.ndarray, " images"]:
        """Whether the clean image is classified correctly."""
        return np.argmax(self.logits, axis=1) == self.labels

    @property
    def impl(self) -> str:
        """The name of the keys' PRNG."""
        return str(jax.random.key_impl(self.keys))

    def key_data(self, name: str = "") -> UInt32[np.ndarray, "images ..."]:
        """Key data of an attack: by its name, so that it draws the same whatever runs before."""
        keys = fold_in(self.keys, zlib.crc32(name.encode())) if name else self.keys
        return np.asarray(jax.random.key_data(keys))

    def size_for(self, images: int) -> int:
        """The batch size for so many images."""
        return size_for(images, self.batch_size, self.device.multiple)


def ask(
    threat: Threat,
    function: Callable[..., Array],
    images: Array,
    labels: Array,
    key: Array | int,
    *,
    batch_size: int,
    mesh: Mesh | None,
    eot_samples: int = 0,
) -> Asked:
    """Checks what is asked, and has the function classify the clean images.

    Raises:
        ValueError: if images, labels, the function's outputs or the batch size make no sense.
    """
    device = device_for(function, mesh)
    if batch_size < 1 or batch_size % device.multiple:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of {device.multiple}"
        )
    check_input(threat, images, labels)
    images, labels = np.asarray(images), np.asarray(labels, np.int32)
    keys = per_image_keys(key, len(images))
    body = Outputs(eot_samples, str(jax.random.key_impl(keys)))
    rows = images, np.asarray(jax.random.key_data(keys))
    logits = in_batches(lambda *r: device.run(body, r), rows, batch_size)
    told = tuple(check_logits(logits, labels))
    return Asked(threat, device, images, labels, keys, batch_size, logits, told)


class Record(Protocol):
    """What an ensemble has done so far."""

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for the state file."""


class Saved:
    """The record of an ensemble in its file, which belongs to what was asked and to the function.

    Args:
        asked: what was asked.
        path: of the file; None: nothing is kept.
        *settings: what else must be the same for a record to be gone on from: arrays, or things
            with a ``repr``.
    """

    def __init__(self, asked: Asked, path: str | Path | None, *settings: object) -> None:
        threat = asked.threat.norm, *(float(v) for v in asked.threat[1:])
        data = asked.images, asked.labels, asked.key_data()
        owner = fingerprint([threat, asked.batch_size, *settings, *data])
        # Of several processes the first one writes; all read, from a file system that they share.
        is_first = jax.process_index() == 0
        self._file, self._logits = StateFile(path, owner, writes=is_first), asked.logits

    def load(self) -> dict[str, np.ndarray] | None:
        """The arrays of the record; None if there is none.

        Raises:
            ValueError: if the file is damaged, of another evaluation or of another function.
        """
        arrays = self._file.load()
        if arrays is None:
            return None
        logits, scale = self._logits, float(np.max(np.abs(self._logits))) + 1e-6
        if not np.allclose(arrays.pop("logits"), logits, rtol=1e-2, atol=1e-2 * scale):
            raise ValueError(
                f"state file {self._file.path} is of another function (its clean logits differ): "
                "delete it to start again, or give another"
            )
        return arrays

    def save(self, record: Record) -> None:
        """Writes the record."""
        if self._file.path is not None:
            self._file.save({"logits": self._logits, **record.arrays()})

    def carry_out(
        self,
        calls: Iterable[Outcome],
        note: Callable[[Outcome], None],
        record: Record,
        pause: Callable[[], None],
    ) -> None:
        """Notes in the record what each call of the device found, and saves it now and then.

        Args:
            calls: of the device.
            note: takes in what one of them found.
            record: what is saved.
            pause: called after each of them; the record is saved first if it raises.
        """
        for outcome in calls:
            note(outcome)
            if self._file.path is not None and first_says(self._file.is_due):
                self.save(record)
            try:
                pause()
            except BaseException:
                self.save(record)
                raise


def confirmed(
    asked: Asked, adversarial: Float[np.ndarray, "images ..."], at: Int[np.ndarray, " fooled"]
) -> Bool[np.ndarray, " fooled"]:
    """Whether the adversarial images ``at`` are what an attack says they are.

    Looked at once more by the function as it was given: misclassified, in the ball around the clean
    ones, and in the pixel range.
    """
    threat, images = asked.threat, adversarial[at]
    logits = in_batches(asked.device.function, (images,), asked.size_for(len(at)))
    valid = np.argmax(logits, axis=1) != asked.labels[at]
    far = np.asarray(distance(threat, images, asked.images[at]))
    slack = 1e-5 * (threat.upper - threat.lower)
    valid &= far <= float(threat.epsilon) * (1 + 1e-5) + slack
    pixels = images.reshape(len(images), -1).astype(np.float32)
    return valid & (pixels.min(1) >= threat.lower) & (pixels.max(1) <= threat.upper)


def go_on() -> None:
    """What is done between two calls of the device, unless something else is asked: nothing."""


def first_to_fool(correct: Bool[np.ndarray, " images"]) -> np.ndarray:
    """The names of the attacks that succeeded, before there was any; str [images]."""
    return np.where(correct, "", "clean").astype("<U64")
