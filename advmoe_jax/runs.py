"""One run in its directory, from config to report; whatever was begun goes on.

See the README for what a run's directory holds.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax import experiment
from advmoe_jax.attacks import make_threat, pgd
from advmoe_jax.data import pipeline
from advmoe_jax.data.batch import BatchRecipe, Mixture
from advmoe_jax.data.extra import load_extra
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import Stream
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import suite
from advmoe_jax.evaluation.accuracy import create_evaluator
from advmoe_jax.evaluation.cost import describe, network_cost
from advmoe_jax.evaluation.routing import agreement, routing_summary
from advmoe_jax.files import write_bytes
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import DATA_AXIS, check_batch, data_mesh
from advmoe_jax.reports import explanation_figures, write_report
from advmoe_jax.training import loop, methods
from advmoe_jax.training.balance import Balance
from advmoe_jax.training.log import RunLog
from advmoe_jax.training.optimizers import create_optimizers
from advmoe_jax.training.state import create_state

Tree = dict[str, Any]


def complete(
    config: ConfigDict, workdir: Path, images: experiment.Images, console: Console
) -> dict[str, Any]:
    """Trains to the end, evaluates, and writes the report; the same call again resumes.

    Args:
        config: of the run.
        workdir: its directory, claimed by this config.
        images: of the run.
        console: where people read.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: if the config cannot be trained.
        loop.Stopped: on SIGTERM, after saving.
    """
    train(config, workdir, images, console)
    results = experiment.evaluate(
        config, workdir, images, attacks=config.evaluation.attacks, console=console
    )
    if jax.process_index() == 0:
        write_report(workdir)
    return results


def explain(
    config: ConfigDict,
    workdir: Path,
    images: experiment.Images,
    *,
    attack: str,
    examples: int = 0,
    which: str = "best",
) -> dict[str, Any]:
    """Explains a trained run: ``explanation.json``, and the figures of it.

    Takes what ``experiment.explain`` takes, and raises what it raises. The report shows them when
    it is written next.

    Returns:
        The content of ``explanation.json``.
    """
    found, seen = experiment.explain(
        config, workdir, images, attack=attack, examples=examples, which=which
    )
    if jax.process_index() == 0:
        test = experiment.subset(images.test, examples)
        for name, png in explanation_figures(found, seen, test.images).items():
            write_bytes(workdir / name, png)
    return found


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory this config's.

    A run that was moved here may find its data, and the runs it builds on, elsewhere than before.

    Raises:
        UserError: if it holds checkpoints of another config.
    """
    path = workdir / "config.json"
    # Before the first checkpoint there is nothing to protect: a mistyped try binds nobody.
    if not path.exists() or not (
        experiment.is_closed(workdir) or (workdir / experiment.CHECKPOINTS).exists()
    ):
        if jax.process_index() == 0:
            config_lib.save(config, path)
        return
    theirs = config_lib.load(path)
    if (name := config_lib.difference(config, theirs)) is not None:
        raise UserError(
            f"{workdir} holds a run with {name}={config_lib.value(theirs, name)!r}, this command "
            f"has {config_lib.value(config, name)!r}: use another --workdir"
        )
    if jax.process_index() == 0:
        config_lib.save(config, path)


def train(config: ConfigDict, workdir: Path, images: experiment.Images, console: Console) -> None:
    """Trains to the end, from the last checkpoint if there is one.

    Raises:
        UserError: if the config cannot be trained.
        loop.Stopped: on SIGTERM, after saving.
    """
    if experiment.is_closed(workdir):
        console.print("trained already, to the end", highlight=False)
        return
    mesh = data_mesh(config.num_devices)
    check_batch("batch_size", config.batch_size, mesh, config.microbatches)
    training_images, mixture = mix(config, images)
    kind = Stream if config.data.stream else pipeline.Resident
    recipe = BatchRecipe(config.batch_size, config.data.crop_padding, config.data.flip, mixture)
    feed = kind(training_images, mesh, recipe)
    steps_per_epoch = feed.steps_per_epoch
    if steps_per_epoch == 0:
        raise UserError(
            f"batch_size={config.batch_size} is larger than the {len(images.train.labels)} images "
            "of the training split"
        )
    keys = experiment.keys(config.seed)
    network, params, stats = experiment.create_network(config, images, keys.init)
    # A mistake in what comes last must not wait for the training before it.
    suite.parse_attacks(config.evaluation.attacks, config, network.is_moe)
    pruning_epochs = 0
    if config.method == "hydra":
        pruning_epochs = config.pruning.epochs
        params, stats = experiment.prune_dense_run(config, params, stats)
    if config.start.run:
        params, stats = experiment.start_from_run(config, params, stats)
    optimizers, step = _shared_step(_recipe(config), network, steps_per_epoch, pruning_epochs)
    task = loop.Task(
        step=step,
        feed=feed,
        validate=create_validation(config, network, images, mesh),
        # Standard training has no robust accuracy worth choosing by.
        selected_by=("standard_accuracy" if config.method == "standard" else "robust_accuracy"),
        num_epochs=config.num_epochs,
        order_key=keys.order,
        step_key=keys.step,
        patience=config.patience,
    )
    state = create_state(params, stats, optimizers, averaged=config.ema_decay > 0)
    cost = network_cost(config.model, images.train.images.shape[1:], len(images.class_names))
    console.print(f"{config.model.name}: {describe(cost)}", highlight=False, soft_wrap=True)
    with experiment.open_checkpoints(config, workdir) as checkpointer:

        def open_log(step: int) -> RunLog:
            return RunLog(workdir, step, console, enabled=jax.process_index() == 0)

        loop.train(task, state, mesh, checkpointer, open_log)


def mix(config: ConfigDict, images: experiment.Images) -> tuple[Split, Mixture]:
    """The training images, extra ones behind them, and what a batch is mixed of.

    Raises:
        UserError: if extra images are asked for and cannot be had.
    """
    data, train = config.data, images.train
    mixture = Mixture(
        cutmix=data.cutmix, cutmix_alpha=data.cutmix_alpha, num_classes=len(images.class_names)
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


def _recipe(config: ConfigDict) -> FrozenConfigDict:
    """What optimizers and step follow from, besides the network and the lengths of a run."""
    names = ("method", "attack", "loss", "balance", "optimizer", "ema_decay", "microbatches")
    recipe = {name: config[name] for name in (*names, "num_epochs")}
    return FrozenConfigDict(recipe | {"start": {"frozen": config.start.frozen}})


# Runs that differ in seed and data alone share one step, and what was compiled from it. Jitted, it
# is traced once: for the shapes of its metrics, and for training.
@lru_cache(maxsize=16)
def _shared_step(
    recipe: FrozenConfigDict, network: Network, steps_per_epoch: int, pruning_epochs: int
) -> tuple[methods.Optimizers, methods.Step]:
    optimizers = create_optimizers(
        recipe.optimizer, steps_per_epoch, recipe.num_epochs, pruning_epochs
    )
    step = create_step(recipe, network, optimizers, steps_per_epoch, pruning_epochs)
    return optimizers, jax.jit(step)


def create_step(
    config: ConfigDict,
    network: Network,
    optimizers: methods.Optimizers,
    steps_per_epoch: int,
    pruning_epochs: int = 0,
) -> methods.Step:
    """The method's step, mapped over ``DATA_AXIS``, with the config's training attack."""
    weights, balance = config.loss.to_dict(), config.balance.to_dict()
    settings = methods.Settings(
        pruning_steps=pruning_epochs * steps_per_epoch,
        awp_warmup_steps=round(weights.pop("awp_warmup_epochs") * steps_per_epoch),
        ema_decay=config.ema_decay,
        frozen=config.start.frozen,
        balance=Balance(
            warmup_steps=round(balance.pop("warmup_epochs") * steps_per_epoch), **balance
        ),
        **weights,
    )
    loss = methods.training_attack_loss(config.method)
    try:
        attack = pgd(
            make_threat(config.attack.norm, config.attack.epsilon),
            num_steps=config.attack.num_steps,
            step_size=config.attack.step_size,
            loss=loss,
            start="gaussian" if loss == "kl" else "uniform",
        )
    except ValueError as error:
        raise UserError(f"config.attack: {error}") from None
    return methods.create_step(
        config.method, network, optimizers, attack, settings, DATA_AXIS, config.microbatches
    )


def create_validation(
    config: ConfigDict, network: Network, images: experiment.Images, mesh: Mesh
) -> Callable[[Tree, Tree, int], Tree]:
    """(params, stats, epoch) -> SA, RA and routing on the validation split."""
    data = pipeline.put(images.validation, mesh)
    batch_size = min(config.evaluation.batch_size, len(images.validation.labels))
    clean, attacked = (
        create_evaluator(
            network, suite.named_attack(name, config, network.is_moe), mesh, batch_size
        )
        for name in ("clean", f"pgd{config.evaluation.validation_steps}")
    )
    key = experiment.keys(config.seed).evaluation

    def validate(params: Tree, stats: Tree, epoch: int) -> Tree:
        fresh = jax.random.fold_in(key, epoch)
        before, after = (e(params, stats, data, fresh) for e in (clean, attacked))
        routing = routing_summary(before, network.num_experts)
        if routing is not None:
            routing["agreement"] = agreement(before, after)
        return {
            "standard_accuracy": before.accuracy,
            "robust_accuracy": after.accuracy,
            "routing": routing,
        }

    return validate
