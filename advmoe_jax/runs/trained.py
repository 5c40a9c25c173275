"""A trained network as a notebook has it: asked, attacked, saved, without its data set."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import storage
from advmoe_jax.data import pipeline
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import accuracy, views
from advmoe_jax.evaluation.accuracy import Outcome, create_evaluator
from advmoe_jax.evaluation.exit_attacks import check_exits
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.wanted import other_threat
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import distribute, state_specs
from advmoe_jax.runs import build, saved
from advmoe_jax.runs.attacking import Job, run_attack
from advmoe_jax.runs.build import ImageKind, Images
from advmoe_jax.runs.devices import measuring_mesh
from advmoe_jax.runs.saved import Saved
from advmoe_jax.types import Array, Logits, Tree


class Attacked(NamedTuple):
    """What an attack made of n images.

    Attributes:
        name: of the attack.
        settings: norm, epsilon, steps and whatever else its numbers must not be read without.
        images: adversarial ones; the clean image where an ensemble has found none.
        labels: of the images.
        clean: the network's answers to the clean images; see ``evaluation.Outcome``.
        attacked: those to ``images``. ``attacked.correct`` is what robust accuracy counts.
        fooled_by: of an ensemble, the first attack that succeeded, ``clean`` where none was needed,
            and an empty string where none did; None for other attacks.
        warnings: why the numbers may not mean what they seem to, a sentence each.
    """

    name: str
    settings: dict[str, Any]
    images: Float[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, " n"]
    clean: Outcome
    attacked: Outcome
    fooled_by: np.ndarray | None
    warnings: tuple[str, ...]

    @property
    def robust(self) -> Bool[np.ndarray, " n"]:
        """The flags: whether an image is classified correctly under attack."""
        return self.attacked.correct

    @property
    def standard_accuracy(self) -> float:
        """Share of the clean images classified correctly, in [0, 1]."""
        return self.clean.accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share of the attacked images classified correctly, in [0, 1]."""
        return self.attacked.accuracy

    @property
    def agreement(self) -> float | None:
        """Share of first choices of an expert that survive; None without a router."""
        return accuracy.agreement(self.clean, self.attacked)

    def __repr__(self) -> str:
        ball = [f"{n} {self.settings[n]:.4g}" for n in ("epsilon",) if n in self.settings]
        threat = f" ({', '.join([self.settings['norm'], *ball])})" if ball else ""
        told = [
            f"{len(self.labels):,} images",
            f"SA {self.standard_accuracy:.1%}",
            f"RA {self.robust_accuracy:.1%}",
        ]
        if self.agreement is not None:
            told.append(f"routes kept {self.agreement:.1%}")
        told += [f"warning: {warning}" for warning in self.warnings]
        return f"{self.name}{threat}: {', '.join(told)}"


class Run:
    """A trained network, and what is known of it; ``load`` makes one.

    Images are uint8, which are divided by 255, or float32 in [0, 1]; anything else is refused.

    Attributes:
        where: it came from, in words.
        config: every value that it was trained with.
        network: the functional network, for ``network.apply(params, stats, images)``.
        params: its parameters.
        stats: its statistics, the thresholds of a multi-exit network among them.
        kind: name of the data set, shape of an image, names of the classes.
        results: the content of ``results.json``, of just these weights; None if there are none.
        sample: a few test images that travel with the run; None if there are none.
    """

    def __init__(
        self,
        where: str,
        config: ConfigDict,
        kind: ImageKind,
        network: Network,
        params: Tree,
        stats: Tree,
        results: Mapping[str, Any] | None = None,
        sample: Split | None = None,
    ) -> None:
        self.where, self.config, self.kind = where, config, kind
        self.network, self.params, self.stats = network, params, stats
        self.results, self.sample = results, sample

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        experts = f", {self.network.num_experts} experts" if self.network.is_moe else ""
        exits = f", {self.network.num_exits} exits" if self.network.num_exits > 1 else ""
        told = [f"{self.config.model.name}{experts}{exits}, {size:,} parameters"]
        if self.results and "standard_accuracy" in self.results:
            told.append(f"SA {self.results['standard_accuracy']:.1%}")
            told += [f"RA {v:.1%} {n}" for n, v in self.results["robust_accuracy"].items()]
        return f"{self.where}: {self.kind.name}, {', '.join(told)}"

    @cached_property
    def images(self) -> Images:
        """The data set, read when it is first named: ``images.test`` are its test images.

        Raises:
            UserError: if it is not where the config says.
        """
        return build.load_images(self.config)

    @cached_property
    def _placed(self) -> tuple[Mesh, Tree, Tree]:
        """The devices, and the weights on them: the run's devices, or as many as there are."""
        mesh, weights = measuring_mesh(self.config), (self.params, self.stats)
        specs = state_specs(weights, self.network.expert_parameters, mesh)
        return mesh, *distribute(weights, specs, mesh)

    @cached_property
    def function(self) -> Callable[[Array], Logits]:
        """Images float32 [B, H, W, C] -> logits, for ``advmoe_jax.attacks``, without any check.

        A mixture is ``attacks.Routed``, a multi-exit network answers at the exit that an image
        leaves at. Its arrays are arguments of what attacks compile.
        """
        return views.whole(self.network, self.params, self.stats)

    def logits(self, images: Array) -> Float[Array, "batch classes"]:
        """The network's answer; differentiable. All images at once."""
        return self.function(self._checked(images))

    def predict(self, images: Array) -> Int[np.ndarray, " n"]:
        """The predicted classes."""
        return self._look(images).predictions

    def routes(self, images: Array) -> Int[np.ndarray, "n decisions k"] | None:
        """The experts chosen, best first; None without a router."""
        return self._look(images).choices

    def exits(self, images: Array) -> Int[np.ndarray, " n"] | None:
        """The exits, from 0, at which the images leave; None for a network without side exits."""
        return self._look(images).exits

    def attack(
        self,
        name: str,
        images: Array,
        labels: Array,
        *,
        norm: str = "",
        epsilon: float | str = "",
        key: Array | None = None,
        batch_size: int = 0,
        individual: bool = False,
        progress: bool = True,
    ) -> Attacked:
        """Attacks the network as ``python -m advmoe_jax.evaluate`` does, on any images.

        Args:
            name: of one attack, such as ``pgd20``, ``autoattack`` or ``moe``; as for ``evaluate``.
            images: to attack.
            labels: of the images, integers.
            norm: another norm than the run's: ``linf``, ``l2`` or ``l1``.
            epsilon: another radius, such as 0.1 or ``"8/255"``, in units of the pixel range.
            key: image ``i`` draws from ``fold_in(key, i)``; None: the key of the run's evaluations.
            batch_size: images attacked at once; 0: the run's.
            individual: every attack of AutoAttack on all images.
            progress: whether to show how far it is.

        Raises:
            UserError: if there is no such attack, or images and labels make no sense.
        """
        split = self._split(images, labels)
        protocol, parts = build.protocol(self.config), self.network.parts
        threat = other_threat(norm, str(epsilon), protocol.threat)
        attack = named_attack(name, protocol, parts, threat)
        check_exits([attack], self.network.num_exits, "router" in parts)
        job = self._job(split, key, batch_size, individual, progress)
        found = run_attack(job, attack)[attack.name]
        told = [*attack.warnings, *found.noted.pop("warnings", [])]
        adversarial = found.outcome.images
        return Attacked(
            name=attack.name,
            settings={**attack.settings, "examples": len(split.labels), **found.noted},
            images=np.asarray(to_float(split.images) if adversarial is None else adversarial),
            labels=split.labels,
            clean=self._evaluate(job),
            attacked=found.outcome._replace(images=None),
            fooled_by=found.fooled_by,
            warnings=tuple(told),
        )

    def _look(self, images: Array) -> Outcome:
        """The network's answers."""
        images = self._checked(images)
        split = Split(np.asarray(images), np.zeros(len(images), np.int32))
        return self._evaluate(self._job(split, None, 0, False, False))

    def _evaluate(self, job: Job) -> Outcome:
        clean = named_attack("clean", build.protocol(self.config), self.network.parts)
        evaluator = create_evaluator(self.network, clean, job.mesh, job.batch_size)
        return evaluator(job.params, job.stats, job.data, job.key)

    def _job(
        self, split: Split, key: Array | None, batch_size: int, individual: bool, progress: bool
    ) -> Job:
        if batch_size < 0:
            raise UserError(f"batch_size={batch_size} must not be negative")
        mesh, params, stats = self._placed
        usual = batch_size or self.config.evaluation.batch_size
        return Job(
            network=self.network,
            params=params,
            stats=stats,
            sha256="",  # of states, of which there are none
            split=split,
            data=pipeline.put(split, mesh),
            mesh=mesh,
            batch_size=min(usual, len(split.labels)),
            key=build.keys(self.config.seed).evaluation if key is None else key,
            console=Console(quiet=not progress),
            keep_images=True,
            individual=individual,
            identity={},
            folder=None,
        )

    def _split(self, images: Array, labels: Array) -> Split:
        """Checked images and labels, on the host."""
        images, labels = np.asarray(self._checked(images)), np.asarray(labels)
        if labels.shape != images.shape[:1] or not len(labels):
            raise UserError(
                f"images {images.shape} and labels {labels.shape} do not match: give at least one "
                "image and a label for each"
            )
        classes = len(self.kind.class_names)
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"labels are {labels.dtype}: give integers, one class per image")
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(
                f"labels reach from {labels.min()} to {labels.max()}; the network's classes are 0 "
                f"to {classes - 1}"
            )
        return Split(images, labels.astype(np.int32))

    def _checked(self, images: Array) -> Array:
        """Images as float32 in [0, 1].

        Raises:
            UserError: if they cannot be meant.
        """
        if not isinstance(images, jax.Array | np.ndarray):
            images = np.asarray(images)
        if images.ndim != 4 or images.shape[1:] != self.kind.shape or not len(images):
            raise UserError(
                f"images are {images.shape}: this network takes [n, "
                f"{', '.join(map(str, self.kind.shape))}], one image or more"
            )
        if images.dtype == np.uint8:
            return to_float(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images are {images.dtype}: give uint8 in 0 to 255, or float32 in [0, 1]"
            )
        if not isinstance(images, jax.core.Tracer) and len(images):
            low, high = float(images.min()), float(images.max())
            if not (low >= -1e-6 and high <= 1 + 1e-6):
                raise UserError(
                    f"pixels reach from {low:g} to {high:g}: give float32 in [0, 1], or uint8"
                )
        return images.astype(jnp.float32)

    def save(self, path: str | Path) -> Path:
        """Writes the run as one file, which ``load`` reads anywhere: weights, config, results.

        Every array is written as float16 where that changes nothing, else as float32. The sample
        goes with it; the data set does not, nor do directories that the config names.
        """
        return saved.write(
            storage.path_of(path),
            Saved(
                config=self.config,
                kind=self.kind,
                params=self.params,
                stats=self.stats,
                results=self.results,
                sample=self.sample,
            ),
        )
