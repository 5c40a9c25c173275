"""Trains one run to its end; whatever was begun goes on."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from advmoe_jax import config as config_lib
from advmoe_jax.data import pipeline
from advmoe_jax.data.batch import Feed
from advmoe_jax.evaluation import named_attacks
from advmoe_jax.evaluation.accuracy import agreement, create_evaluator, routing_summary
from advmoe_jax.evaluation.cost import describe, network_cost
from advmoe_jax.models.network import Network
from advmoe_jax.parallel import in_host_memory
from advmoe_jax.reports import write_report
from advmoe_jax.runs import build, directory, recipe
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.devices import training_mesh
from advmoe_jax.runs.evaluating import Asked, evaluate
from advmoe_jax.runs.rehearsal import check_start
from advmoe_jax.runs.showing import create_showing
from advmoe_jax.training import loop, methods
from advmoe_jax.training.balance import with_equal_experts
from advmoe_jax.training.log import RunLog
from advmoe_jax.training.state import TrainState, create_state
from advmoe_jax.types import Tree


def complete(config: ConfigDict, workdir: Path, images: Images, console: Console) -> Tree:
    """Trains to the end, evaluates, and writes the report; the same call again resumes.

    Args:
        config: of the run, rehearsed (``rehearsal.rehearse``).
        workdir: its directory, claimed by this config.
        images: of the run.
        console: where people read.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: if the config cannot be trained.
        loop.Stopped: on SIGTERM or SIGINT, after saving.
    """
    train(config, workdir, images, console)
    results = evaluate(config, workdir, images, Asked(config.evaluation.attacks), console)
    if jax.process_index() == 0:
        write_report(workdir)
    return results


def show(config: ConfigDict, images: Images, console: Console) -> None:
    """Prints what would be trained: every value of the config, the images, the network's cost.

    Raises:
        UserError: if the config cannot be trained on these images.
    """
    feed = build.training_feed(config, images, training_mesh(config))
    build.network_shapes(config, images.shape[-1], len(images.class_names))
    console.print(config.to_yaml().rstrip(), highlight=False, soft_wrap=True, markup=False)
    _describe(config, images, console)
    steps = feed.steps_per_epoch
    console.print(
        f"{config.num_epochs:,} epochs of {steps:,} steps: {config.num_epochs * steps:,} steps",
        highlight=False,
    )


def _describe(config: ConfigDict, images: Images, console: Console) -> None:
    """Prints which images there are, and what the network costs on them."""
    console.print(images.described, highlight=False, soft_wrap=True, markup=False)
    cost = network_cost(build.architecture(config), images.shape, len(images.class_names))
    console.print(f"{config.model.name}: {describe(cost)}", highlight=False, soft_wrap=True)


def train(config: ConfigDict, workdir: Path, images: Images, console: Console) -> None:
    """Trains to the end, from the last checkpoint if there is one.

    Raises:
        UserError: if the config cannot be trained.
        loop.Stopped: on SIGTERM or SIGINT, after saving.
    """
    if directory.is_closed(workdir):
        console.print("trained already, to the end", highlight=False)
        return
    mesh = training_mesh(config)
    feed = build.training_feed(config, images, mesh)
    # Experts that are shared because no device could hold all of them are made by the host.
    with in_host_memory() if config.expert_shards > 1 else nullcontext():
        network, state = _first_state(config, images, feed)
    task = _task(config, images, network, mesh, feed)
    _describe(config, images, console)
    directory.check_kind(workdir, images.kind)
    if jax.process_index() == 0:
        directory.write_kind(workdir, images.kind)
    with directory.open_checkpoints(config, workdir) as checkpointer:

        def open_log(step: int) -> RunLog:
            return RunLog(workdir, step, console, enabled=jax.process_index() == 0)

        loop.train(task, state, mesh, checkpointer, open_log)


def _first_state(config: ConfigDict, images: Images, feed: Feed) -> tuple[Network, TrainState]:
    network, params, stats = build.create_network(config, images)
    params, stats = _start(config, params, stats)
    if config.start.equal_experts:
        params = with_equal_experts(params, network.stacked)
    optimizers, _ = recipe.optimizers_and_step(config, network, feed.steps_per_epoch)
    return network, create_state(params, stats, optimizers, averaged=config.ema_decay > 0)


def _task(
    config: ConfigDict, images: Images, network: Network, mesh: Mesh, feed: Feed
) -> loop.Task:
    """What the loop trains."""
    keys = build.keys(config.seed)
    return loop.Task(
        step=recipe.optimizers_and_step(config, network, feed.steps_per_epoch)[1],
        feed=feed,
        validate=create_validation(config, network, images, mesh),
        selected_by=methods.method(config.method).selected_by(
            recipe.step_settings(config, feed.steps_per_epoch)
        ),
        num_epochs=config.num_epochs,
        order_key=keys.order,
        step_key=keys.step,
        expert_parameters=network.expert_parameters,
        patience=config.patience,
        show=create_showing(config, network, images),
    )


def _start(config: ConfigDict, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """What training starts from: initial values, or those of another run.

    Raises:
        UserError: if there is no such run, or it is of another network.
    """
    check_start(config)
    start = methods.method(config.method).start
    if start is not None:
        run = config_lib.value(config, start.run)
        model = {**config.model.to_dict(), **start.trained_as}
        trained = directory.restore_other(run, model, (start.trained_part(params), stats))
        params, stats = start.combine(params, trained.params), trained.stats
    if config.start.run:
        model = config.model.to_dict()
        trained = directory.restore_other(config.start.run, model, (params, stats))
        params, stats = trained.params, trained.stats
    return params, stats


def create_validation(
    config: ConfigDict, network: Network, images: Images, mesh: Mesh
) -> Callable[[Tree, Tree, int], Tree]:
    """(params, stats, epoch) -> SA, RA and routing on the validation split."""
    data = pipeline.put(images.validation, mesh)
    batch_size = min(config.evaluation.batch_size, len(images.validation.labels))
    clean, attacked = (
        create_evaluator(
            network,
            named_attacks.named_attack(name, build.protocol(config), network.parts),
            mesh,
            batch_size,
        )
        for name in ("clean", f"pgd{config.evaluation.validation_steps}")
    )
    key = build.keys(config.seed).evaluation

    def validate(params: Tree, stats: Tree, epoch: int) -> Tree:
        fresh = jax.random.fold_in(key, epoch)
        before, after = (e(params, stats, data, fresh) for e in (clean, attacked))
        routing = routing_summary(before, network.num_experts, network.num_routers)
        if routing is not None:
            routing["agreement"] = agreement(before, after)
        return {
            "standard_accuracy": before.accuracy,
            "robust_accuracy": after.accuracy,
            "routing": routing,
        }

    return validate
