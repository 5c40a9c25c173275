"""A config's words turned into things: images, keys, network, attacks; ``recipe`` has the step.

Whatever is made here from a config is made of plain values; nothing below reads a config.
"""

from typing import NamedTuple

import flax.nnx as nnx
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax.attacks import Threat, make_threat
from advmoe_jax.data import sources
from advmoe_jax.data.ahead import check_workers
from advmoe_jax.data.batch import BatchRecipe, Feed, Mixture
from advmoe_jax.data.extra import load_extra
from advmoe_jax.data.pipeline import Resident
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Stream
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.exit_attacks import check_exits
from advmoe_jax.evaluation.records import Protocol
from advmoe_jax.evaluation.wanted import applicable, parse_attacks
from advmoe_jax.models.network import Network, functional
from advmoe_jax.models.registry import FAMILIES, Architecture, create
from advmoe_jax.types import Array, Tree

WITHHELD = "withheld"  # a test split that is the validation split


class ImageKind(NamedTuple):
    """What a trained network must know of its images; it is kept with the run.

    Attributes:
        name: of the data set.
        shape: (height, width, channels) of an image.
        class_names: ``class_names[label]`` is a label's name.
    """

    name: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]


class Images(NamedTuple):
    """The three splits of a run; the test split is for evaluation alone."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    skipped: int = 0  # files among the images that are none

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return tuple(self.test.images.shape[1:])

    @property
    def kind(self) -> ImageKind:
        """What a network of these images must know of them."""
        return ImageKind(self.name, self.shape, self.class_names)

    @property
    def described(self) -> str:
        """How many images and classes there are, in words."""
        counts = ", ".join(
            f"{len(split.labels):,} {name}"
            for name, split in (
                ("training", self.train),
                ("validation", self.validation),
                ("test", self.test),
            )
        )
        size = "x".join(map(str, self.shape))
        text = f"{self.name}: {counts} images of {size}, {len(self.class_names)} classes"
        if self.skipped:
            text += (
                f"; {self.skipped:,} other files among them are skipped: they are no PNG or JPEG, "
                "or links in an archive"
            )
        return text


class Keys(NamedTuple):
    """Independent PRNG keys of a run, all from its seed."""

    init: Array
    order: Array
    step: Array
    evaluation: Array


def load_images(config: ConfigDict) -> Images:
    """Loads the data set, carves the validation split from the training set by seed.

    With ``test_split="withheld"`` what is withheld from training is the test split too: the one
    that nothing may be chosen by is not read. The best checkpoint is then chosen by the images that
    it is measured on, which flatters all networks alike.

    Raises:
        UserError: if the data cannot be had as the config says.
    """
    data = config.data
    if data.test_split == data.train_split:
        raise UserError(
            f"config.data.test_split={data.test_split!r} is the training split: nothing can be "
            "tested on what was learned from; to withhold a part of it set "
            f"config.data.test_split={WITHHELD!r}"
        )
    dataset = sources.load(
        data.source,
        path=data.path,
        image_size=data.image_size,
        train_split=data.train_split,
        test_split=data.train_split if data.test_split == WITHHELD else data.test_split,
        stream=data.stream,
    )
    if len(dataset.class_names) < 2:
        raise UserError(f"{dataset.name} has one class only: there is nothing to tell apart")
    if data.crop_padding > max(dataset.test.images.shape[1:3]):
        raise UserError(
            f"config.data.crop_padding={data.crop_padding} is wider than the images, which are "
            f"{'x'.join(map(str, dataset.test.images.shape[1:3]))}"
        )
    train, validation = sources.carve_validation(
        dataset.train, data.validation_fraction, config.seed
    )
    train = subset(train, data.train_examples)
    test = validation if data.test_split == WITHHELD else dataset.test
    images = Images(*(dataset.name, train, validation, test, dataset.class_names, dataset.skipped))
    check_classes(config, images)
    return images


def check_classes(config: ConfigDict, images: Images) -> None:
    """Raises UserError if the config names an expert for more or fewer classes than there are."""
    of_class, classes = config.get("loss", {}).get("class_experts", ()), len(images.class_names)
    if of_class and len(of_class) != classes:
        raise UserError(
            f"config.loss.class_experts={tuple(of_class)} names the experts of {len(of_class)} "
            f"classes, {images.name} has {classes}"
        )


def subset(split: Split, examples: int) -> Split:
    """``examples`` images drawn without regard to class, always the same ones (0: all)."""
    if not 0 < examples < len(split.labels):
        return split
    return Split(*(array[subset_indices(len(split.labels), examples)] for array in split))


def subset_indices(total: int, examples: int) -> np.ndarray:
    """Which images ``subset`` takes, int64, ascending."""
    if not 0 < examples < total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).permutation(total)[:examples])


def keys(seed: int) -> Keys:
    """The keys of a run."""
    root = jax.random.key(seed)
    return Keys(*(jax.random.fold_in(root, i) for i in range(len(Keys._fields))))


def architecture(config: ConfigDict) -> Architecture:
    """The record of the network that a run's config describes."""
    return FAMILIES[config.family].from_values(config.model.to_dict())


def create_network(config: ConfigDict, images: Images) -> tuple[Network, Tree, Tree]:
    """The functional network with the run's initial parameters and statistics.

    Raises:
        UserError: if the config describes no network for these images.
    """
    key = keys(config.seed).init
    return create(architecture(config), images.shape, len(images.class_names), key)


def network_shapes(config: ConfigDict, channels: int, classes: int) -> tuple[Network, Tree, Tree]:
    """As ``create_network``, with ``jax.ShapeDtypeStruct``s in the place of arrays: at once.

    Args:
        config: of a run.
        channels: of the images.
        classes: number of logits.

    Raises:
        UserError: if the config describes no network for such images.
    """
    model = architecture(config)
    return functional(
        nnx.eval_shape(
            lambda: model.create(in_channels=channels, num_classes=classes, rngs=nnx.Rngs(0))
        )
    )


def threat(config: ConfigDict) -> Threat:
    """The threat model of training and evaluation.

    Raises:
        UserError: if there is no such threat model.
    """
    try:
        return make_threat(config.attack.norm, config.attack.epsilon)
    except ValueError as error:
        raise UserError(f"config.attack: {error}") from None


def protocol(config: ConfigDict) -> Protocol:
    """What the attacks of a run's evaluations share."""
    return Protocol(threat(config), config.evaluation.step_size, config.evaluation.restarts)


def settled(config: ConfigDict, typed: bool) -> ConfigDict:
    """The config, without attacks that its network cannot have and that nobody asked for.

    Args:
        config: of a run.
        typed: whether the user named the attacks, who is told then that they cannot be.

    Raises:
        UserError: if an attack is unknown, or was typed and cannot be.
    """
    wanted, parts = config.evaluation.attacks, architecture(config).parts
    if not wanted.strip(" ,"):
        raise UserError(
            "config.evaluation.attacks names no attack; clean alone measures standard accuracy"
        )
    if not typed:
        wanted = applicable(wanted, parts)
    named = parse_attacks(wanted, protocol(config), parts)
    check_exits(named, architecture(config).num_exits, "router" in parts)
    return config_lib.with_changes(config, {"evaluation.attacks": wanted})


def training_feed(config: ConfigDict, images: Images, mesh: Mesh) -> Feed:
    """The training images as the loop is fed with them.

    Raises:
        UserError: if extra images are asked for and cannot be had, or there is no full batch.
    """
    split, mixture = _training_images(config, images)
    data = config.data
    check_stream(config)
    recipe = BatchRecipe(
        config.batch_size, data.crop_padding, data.flip, mixture, data.crop_area, data.crop_whole
    )
    if data.stream:
        feed = Stream(split, mesh, recipe, data.workers)
    else:
        feed = Resident(split, mesh, recipe)
    if feed.steps_per_epoch == 0:
        raise UserError(
            f"batch_size={config.batch_size} is larger than the {len(images.train.labels)} images "
            "of the training split"
        )
    return feed


def check_stream(config: ConfigDict) -> None:
    """Raises UserError if the config asks streamed images for what they cannot give."""
    data = config.data
    if data.workers and not data.stream:
        raise UserError(
            f"data.workers={data.workers} decode what is streamed: set data.stream=True, or "
            "data.workers=0"
        )
    check_workers(data.workers)
    if not data.crop_whole:
        return
    if data.source == "digits" or not (data.stream and data.image_size and data.crop_area < 1):
        raise UserError(
            "data.crop_whole=True cuts crops out of image files: it needs data.stream=True, "
            "data.image_size, and data.crop_area below 1"
        )


def _training_images(config: ConfigDict, images: Images) -> tuple[Split, Mixture]:
    """The training images, extra ones behind them, and what a batch is mixed of."""
    data, train = config.data, images.train
    if data.cutmix and data.mixup:
        raise UserError(
            f"data.cutmix={data.cutmix} and data.mixup={data.mixup}: mix images one way, and set "
            "the other to 0"
        )
    mixture = Mixture(
        cutmix=data.cutmix,
        cutmix_alpha=data.cutmix_alpha,
        mixup=data.mixup,
        num_classes=len(images.class_names),
    )
    if bool(data.extra_path) != (data.extra_share > 0):
        raise UserError(
            f"data.extra_share={data.extra_share} and data.extra_path={data.extra_path!r} go "
            "together: give the share of each batch and the .npz file it comes from, or neither"
        )
    if not data.extra_path:
        return train, mixture
    per_batch = round(data.extra_share * config.batch_size)
    if not 0 < per_batch < config.batch_size:
        raise UserError(
            f"data.extra_share={data.extra_share} of batch_size={config.batch_size} leaves "
            f"{per_batch} extra images in a batch; it must have at least one of each kind"
        )
    if not isinstance(train.images, np.ndarray):
        raise UserError(
            "data.extra_path needs decoded training images: set data.stream=False, or leave it out"
        )
    extra = load_extra(data.extra_path, train.images.shape[1:], len(images.class_names))
    joined = Split(*(np.concatenate(part) for part in zip(train, extra, strict=True)))
    mixture = mixture._replace(extra_images=len(extra.labels), extra_per_batch=per_batch)
    return joined, mixture
