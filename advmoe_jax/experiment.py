"""A config's words turned into things: the images, the network, the mesh.

Shared by the commands; a notebook may start here too.
"""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from advmoe_jax import config as config_lib
from advmoe_jax.attacks import AttackReport, MoEResult
from advmoe_jax.data import pipeline, sources
from advmoe_jax.data.augment import to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import explanation, results, suite
from advmoe_jax.evaluation.accuracy import Outcome, Saved, answer_images, create_evaluator
from advmoe_jax.evaluation.attacked import attacked
from advmoe_jax.evaluation.cost import network_cost
from advmoe_jax.evaluation.outcomes import write_examples, write_outcome
from advmoe_jax.evaluation.routing import collapse_warnings
from advmoe_jax.files import fingerprint
from advmoe_jax.models import registry
from advmoe_jax.models.network import Network, functional
from advmoe_jax.models.sparse import scores_of
from advmoe_jax.parallel import data_mesh, replicate
from advmoe_jax.training.checkpoint import Checkpointer, tree_sha256

Array = jax.Array
Tree = dict[str, Any]

# Of a run that is trained; of one that is closed.
CHECKPOINTS, WEIGHTS = "checkpoints", "weights"


class Images(NamedTuple):
    """The three splits of a run; the test split is for evaluation alone."""

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]


class Keys(NamedTuple):
    """Independent PRNG keys of a run, all from its seed."""

    init: Array
    order: Array
    step: Array
    evaluation: Array


def load_images(config: ConfigDict) -> Images:
    """Loads the data set, carves the validation split from the training set by seed.

    Raises:
        UserError: if the data cannot be had as the config says.
    """
    data = config.data
    dataset = sources.load(
        data.source,
        path=data.path,
        image_size=data.image_size,
        train_split=data.train_split,
        test_split=data.test_split,
        stream=data.stream,
    )
    train, validation = sources.carve_validation(
        dataset.train, data.validation_fraction, config.seed
    )
    train = subset(train, data.train_examples)
    return Images(dataset.name, train, validation, dataset.test, dataset.class_names)


def create_network(config: ConfigDict, images: Images, key: Array) -> tuple[Network, Tree, Tree]:
    """The functional network with initial parameters and statistics."""

    return functional(
        registry.create_model(
            config.model,
            in_channels=images.test.images.shape[-1],
            num_classes=len(images.class_names),
            rngs=nnx.Rngs(params=key),
        )
    )


def keys(seed: int) -> Keys:
    """The keys of a run."""
    root = jax.random.key(seed)
    return Keys(*(jax.random.fold_in(root, i) for i in range(len(Keys._fields))))


def create_workdir(path: str) -> Path:
    """Makes a run's directory.

    Raises:
        UserError: if the path cannot be a directory that we may write.
    """
    workdir = Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--workdir={path} cannot be made: {error.strerror}") from None
    use_compilation_cache(workdir)
    return workdir


def use_compilation_cache(workdir: Path) -> None:
    """Keeps compiled programs beside the runs, so that resuming and evaluating start at once.

    JAX_COMPILATION_CACHE_DIR, if set, says where instead.
    """
    if not jax.config.jax_compilation_cache_dir:
        cache = workdir.absolute().parent / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def open_checkpoints(config: ConfigDict, workdir: Path) -> Checkpointer:
    """The checkpoints of the run in ``workdir``; if it is closed, they hold the weights alone."""
    name = WEIGHTS if is_closed(workdir) else CHECKPOINTS
    return Checkpointer(workdir / name, config.checkpoint.keep)


def is_closed(workdir: Path) -> bool:
    """Whether the run in ``workdir`` is trained to its end, and ``close`` has been called."""
    return (workdir / WEIGHTS).exists()


def close(config: ConfigDict, workdir: Path) -> None:
    """Leaves of the checkpoints of a run that has ended what evaluations read, in ``weights``.

    That is parameters and statistics (or their averages), the last and the best, without the
    optimizers' states: the directory becomes small. The run cannot be trained any further.
    """
    if not is_closed(workdir):
        parts = ("state/average/",) if config.ema_decay else ("state/params/", "state/stats/")
        with open_checkpoints(config, workdir) as checkpointer:
            checkpointer.extract(workdir / WEIGHTS, lambda name: name.startswith(parts))
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)


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


def evaluate(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    *,
    attacks: str,
    examples: int = 0,
    batch_size: int = 0,
    norm: str = "",
    epsilon: str = "",
    which: str = "best",
    save_examples: bool = False,
    individual: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Evaluates the run in ``workdir`` on its test split and writes ``results.json``.

    Also ``outcomes/<attack>.npz`` and, if asked, ``examples/<attack>.npz`` (see
    ``evaluation.outcomes``). What is done is kept in ``unfinished/`` until the end: the same call
    goes on after a kill.

    Args:
        config: of the run.
        workdir: the run's directory.
        images: of the run.
        attacks: comma-separated names, see ``evaluation.suite``.
        examples: number of test images; 0 for all.
        batch_size: images attacked at once; 0 for the config's.
        norm: another norm than the config's, or empty.
        epsilon: another radius than the config's, such as ``8/255``, or empty.
        which: ``best`` by the validation split, or ``last``.
        save_examples: whether to write the adversarial images.
        individual: whether every attack of AutoAttack runs on all images, so that each one's own
            robust accuracy is known; costs more.
        console: shows a progress bar.

    Returns:
        What was written.

    Raises:
        UserError: if there is no checkpoint to evaluate, or an attack cannot be made.
    """
    # The run's devices, or as many of them as this machine has.
    mesh = data_mesh(min(config.num_devices, jax.device_count()))
    network, params, stats = create_network(config, images, keys(config.seed).init)
    threat = suite.other_threat(norm, epsilon, config)
    named = suite.parse_attacks(attacks, config, network.is_moe, threat)
    several = jax.process_count() > 1
    if several and (save_examples or any(attack.packed for attack in named)):
        raise UserError(
            "--save_examples and attacks other than PGD's relatives run on one host: evaluate the "
            "run's directory there"
        )
    old = results.read_results(workdir)  # if it is damaged, say so before the work
    last, evaluated = _restore(config, workdir, which, replicate((params, stats), mesh))
    indices = subset_indices(len(images.test.labels), examples)
    test = subset(images.test, examples)
    unfinished = workdir / "unfinished"
    job = _Job(
        network,
        evaluated.params,
        evaluated.stats,
        tree_sha256((evaluated.params, evaluated.stats)),
        test,
        pipeline.put(test, mesh),
        mesh,
        min(batch_size or config.evaluation.batch_size, len(test.labels)),
        keys(config.seed).evaluation,
        save_examples,
        individual,
        None if several else unfinished,
        console,
    )
    outcomes, settings = {}, {}
    for attack in named:
        try:
            found = _run_attack(job, attack)
        except ValueError as error:
            raise UserError(f"attack {attack.name!r}: {error}") from None
        for name, (outcome, fooled_by, noted) in found.items():
            outcomes[name] = outcome
            more = {"examples": len(test.labels), "seed": config.seed}
            settings[name] = {**attack.settings, **more, **noted}
            if jax.process_index() == 0:
                write_outcome(
                    workdir, name, outcome, indices, test.labels, job.params_sha256, fooled_by
                )
        if save_examples and attack.name != "clean":
            write_examples(workdir, attack, outcomes[attack.name], indices, test.labels)
            outcomes[attack.name] = outcomes[attack.name]._replace(images=None)
    cost = network_cost(config.model, test.images.shape[1:], len(images.class_names))
    measured = results.measured(outcomes, settings, network.num_experts)
    found = {
        "method": config.method,
        "model": config.model.name,
        "dataset": images.name,
        "seed": config.seed,
        "steps": last.step,
        **measured,
        "num_params": cost["params"]["total"],
        "macs_per_image": cost["macs"]["total"],
        "cost": cost,
        "params_sha256": tree_sha256((last.params, last.stats)),
        "evaluated": _identity(which, evaluated),
        "warnings": [],  # below: they are of all attacks, those of earlier evaluations too
        **results.provenance(mesh.size),
        "config": json.loads(config.to_json()),
    }
    found = results.merge(old, found)
    found["warnings"] = [
        *collapse_warnings(measured["routing"], "of the test split"),
        *results.attack_warnings(found["attacks"]),
    ]
    if jax.process_index() == 0:
        results.write_results(workdir, found)
        _forget(unfinished, [job.saved(attack) for attack in named])
    return found


def explain(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    *,
    attack: str,
    examples: int = 0,
    which: str = "best",
) -> tuple[dict[str, Any], explanation.Seen]:
    """Explains the run in ``workdir`` on its test split and writes ``explanation.json``.

    Args:
        config: of the run.
        workdir: the run's directory.
        images: of the run.
        attack: on the whole network, see ``evaluation.suite``.
        examples: number of test images; 0 for all.
        which: ``best`` by the validation split, or ``last``.

    Returns:
        What was written, and what became of each image under ``attack``.

    Raises:
        UserError: if there is no checkpoint to explain, or the attack cannot be made.
    """
    mesh = data_mesh(1)
    network, params, stats = create_network(config, images, keys(config.seed).init)
    named = explanation.explained_attack(attack, config, network.is_moe)
    _, restored = _restore(config, workdir, which, (params, stats))
    test, key = subset(images.test, examples), keys(config.seed).evaluation
    of_network = (network, restored.params, restored.stats, test)

    def see(named: suite.NamedAttack) -> tuple[dict[str, Any] | None, explanation.Seen]:
        size = config.evaluation.batch_size
        seen = explanation.see(*of_network, named, key, gate=config.model.gate, batch_size=size)
        return explanation.describe(seen, network.num_experts, len(images.class_names)), seen

    routing, seen = see(named)
    found = {
        "evaluated": _identity(which, restored),
        "examples": len(test.labels),
        "seed": config.seed,
        "class_names": list(images.class_names),
        "attack": {"name": named.name, **named.settings},
        "routing": routing,
        "curve": explanation.robust_accuracies(*of_network, config, key),
        **results.provenance(mesh.size),
    }
    if network.is_moe:
        on_router = suite.named_attack("router_kl", config, is_moe=True)
        alone = {"name": on_router.name, **on_router.settings, **see(on_router)[0]}
        found["router_attack"] = {
            name: value
            for name, value in alone.items()
            if name not in ("load", "load_per_class", "pathways", "layers")
        }
    results.write_json(workdir / explanation.FILE, found)
    return found, seen


def prune_dense_run(config: ConfigDict, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """What method ``hydra`` starts from: a trained dense network, and scores of its channels.

    Args:
        config: of the new run; ``config.pruning.dense_run`` is the trained one's directory.
        params: initial parameters of the Sparse network.
        stats: likewise.

    Raises:
        UserError: if there is no such run, or it is of another network.
    """
    pruning = config.pruning
    if not pruning.dense_run:
        raise UserError(
            "method='hydra' prunes a trained dense network: set pruning.dense_run to the workdir "
            "of one, trained with --config.model.keep=1 --config.method=trades, say"
        )
    if not 0 < pruning.epochs < config.num_epochs:
        raise UserError(
            f"pruning.epochs={pruning.epochs} must lie between 1 and "
            f"num_epochs-1={config.num_epochs - 1}: channels are chosen first, then kernels trained"
        )
    like = ({"router": {}, "experts": params["experts"]}, stats)
    best = _best_of(pruning.dense_run, {**config.model.to_dict(), "keep": 1.0}, like)
    scores = scores_of(best.params["experts"], params["router"])
    return {"router": scores, "experts": best.params["experts"]}, best.stats


def start_from_run(config: ConfigDict, params: Tree, stats: Tree) -> tuple[Tree, Tree]:
    """Parameters and statistics of the best checkpoint of the run ``config.start.run``.

    Args:
        config: of the new run.
        params: its initial parameters.
        stats: likewise.

    Raises:
        UserError: if there is no such run, or it is of another network.
    """
    best = _best_of(config.start.run, config.model.to_dict(), (params, stats))
    return best.params, best.stats


def _best_of(directory: str, model: Tree, like: tuple[Tree, Tree]) -> "_Restored":
    """The best checkpoint of another run, which must be of the network ``model``."""
    workdir = Path(directory).expanduser()
    config = config_lib.load(workdir / "config.json")
    for name, value in config.model.to_dict().items():
        # JSON turns tuples into lists.
        if json.loads(json.dumps(model[name])) != json.loads(json.dumps(value)):
            raise UserError(
                f"{workdir} is no run of this network: it has model.{name}={value!r}, "
                f"this one {model[name]!r}"
            )
    return _restore(config, workdir, "best", like)[1]


def restore(
    config: ConfigDict, workdir: Path, images: Images, which: str = "best"
) -> tuple[Network, Tree, Tree]:
    """The trained network of the run in ``workdir``: ``(network, params, stats)``.

    Args:
        config: of the run.
        workdir: the run's directory.
        images: of the run; their shape and classes are the network's.
        which: ``best`` by the validation split, or ``last``.

    Raises:
        UserError: if there is no checkpoint to restore.
    """
    network, params, stats = create_network(config, images, keys(config.seed).init)
    restored = _restore(config, workdir, which, (params, stats))[1]
    return network, restored.params, restored.stats


class _Restored(NamedTuple):
    """Parameters and statistics of one checkpoint, or their averages if it has them."""

    step: int
    params: Tree
    stats: Tree


def _identity(which: str, restored: _Restored) -> dict[str, Any]:
    """Which checkpoint numbers are of, as results say it."""
    return {
        "checkpoint": which,
        "step": restored.step,
        "params_sha256": tree_sha256((restored.params, restored.stats)),
    }


def _restore(
    config: ConfigDict, workdir: Path, which: str, like: tuple[Tree, Tree]
) -> tuple[_Restored, _Restored]:
    """The last checkpoint, and the one to evaluate; averages of the weights if there are any."""
    wanted = {"params": like[0], "stats": like[1]}
    if config.ema_decay:
        wanted = {"average": wanted}

    def read(restore: Callable[[Tree], tuple[int, Tree] | None]) -> _Restored | None:
        found = restore({"state": wanted})
        return found and _Restored(found[0], **found[1]["state"].get("average", found[1]["state"]))

    try:
        with open_checkpoints(config, workdir) as checkpointer:
            last = read(checkpointer.restore_latest)
            best = read(checkpointer.restore_best) if which == "best" else last
    except ValueError as error:  # an imported network may have other classes than the data
        raise UserError(f"{error}; is config.data what the network was trained on?") from None
    if last is None or best is None:
        first = (
            f"remove {workdir / WEIGHTS} and train again" if is_closed(workdir) else "train first"
        )
        raise UserError(f"{workdir} has no intact checkpoint to evaluate; {first}")
    return last, best


class _Job(NamedTuple):
    """What every attack of an evaluation runs on."""

    network: Network
    params: Tree
    stats: Tree
    params_sha256: str
    test: Split
    data: pipeline.DeviceData
    mesh: Mesh
    batch_size: int
    key: Array
    keep_images: bool
    individual: bool
    unfinished: Path | None
    console: Console

    def saved(self, attack: suite.NamedAttack) -> Saved | None:
        """Where the attack's state is kept; under a name that is this job's alone."""
        if self.unfinished is None:
            return None
        key = np.asarray(jax.random.key_data(self.key))
        asked = attack.name, attack.settings, self.params_sha256, self.batch_size
        how = self.mesh.size, self.keep_images, self.individual
        owner = fingerprint([*asked, *how, key, *self.test])
        return Saved(self.unfinished / f"{attack.name}-{owner[:12]}.npz", owner)


# Of an attack's name, or of what it finds besides: answers, which attack succeeded, what to note.
_Found = dict[str, tuple[Outcome, np.ndarray | None, dict[str, Any]]]


def _run_attack(job: _Job, attack: suite.NamedAttack) -> _Found:
    return _run_batchwise(job, attack) if attack.perturb else _run_packed(job, attack)


def _run_batchwise(job: _Job, attack: suite.NamedAttack) -> _Found:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    hidden = not job.console.is_terminal
    with Progress(*columns, console=job.console, transient=True, disable=hidden) as bar:
        row = bar.add_task(attack.name, total=len(job.test.labels))
        evaluator = create_evaluator(job.network, attack, job.mesh, job.batch_size)
        outcome = evaluator(
            job.params,
            job.stats,
            job.data,
            job.key,
            warm_up=True,
            advance=partial(bar.advance, row),
            keep_images=job.keep_images and attack.name != "clean",
            saved=job.saved(attack),
        )
    outside = int(np.sum(outcome.outside))
    told = f"{outside} images left the ball or the pixel range and count as not attacked"
    return {attack.name: (outcome, None, {"warnings": [told]} if outside else {})}


def _run_packed(job: _Job, attack: suite.NamedAttack) -> _Found:
    began = time.perf_counter()
    function = attacked(job.network, job.params, job.stats)
    size = -(-job.batch_size // job.mesh.size) * job.mesh.size
    saved = job.saved(attack)
    numbers = jnp.arange(len(job.test.labels), dtype=jnp.int32)
    alone = {"individual": True} if job.individual and "autoattack" in attack.name else {}
    with warnings.catch_warnings():  # they are among the results
        warnings.simplefilter("ignore", UserWarning)
        result = attack.packed(
            function,
            np.asarray(to_float(job.test.images)),
            job.test.labels,
            jax.vmap(partial(jax.random.fold_in, job.key))(numbers),
            batch_size=size,
            state_file=saved and saved.path,
            progress=job.console.is_terminal,
            mesh=job.mesh,
            **alone,
        )
    answers = answer_images(
        job.network,
        attack.threat,
        job.mesh,
        job.batch_size,
        job.params,
        job.stats,
        job.data,
        result.adversarial,
    )
    seconds = time.perf_counter() - began
    answers = answers._replace(seconds=seconds)
    noted: dict[str, Any] = {
        "parts": {name: _part(report) for name, report in result.attacks.items()},
        "warnings": list(result.warnings),
    }
    if not isinstance(result, MoEResult):
        return {attack.name: (answers, result.fooled_by, noted)}
    # Pathways held fixed have judged, too: what the network itself says stands apart.
    by_network = answers._replace(correct=answers.correct & result.network_robust)
    outcome = answers._replace(correct=result.robust & by_network.correct)
    noted["network_accuracy"] = by_network.accuracy
    found = {attack.name: (outcome, result.fooled_by, noted)}
    if attack.name.startswith("moe"):
        name = attack.name.replace("moe", "moe_network", 1)
        found[name] = (by_network, None, {"judge": "the network"})
    return found


def _forget(unfinished: Path, done: list[Saved | None]) -> None:
    """Removes the states of these attacks, and no other evaluation's."""
    for saved in filter(None, done):
        for path in unfinished.glob(f"{saved.path.stem}*"):
            path.unlink()
    with suppress(OSError):  # somebody else's are in it, or there never was one
        unfinished.rmdir()


def _part(report: AttackReport) -> dict[str, Any]:
    return {
        "tried": report.tried,
        "fooled": report.fooled,
        "robust_accuracy": report.accuracy,
        **({} if report.alone is None else {"alone": report.alone}),
        "seconds": round(report.seconds, 2),
        "first_call_seconds": round(report.first_call_seconds, 2),
    }
