"""A run's directory: claimed by one config, restored from, closed when nothing is left to train.

docs/runs.md says what lies in it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from advmoe_jax import config as config_lib
from advmoe_jax import storage
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.files import read_json, write_json
from advmoe_jax.metrics import METRICS, read_metrics
from advmoe_jax.models.network import Network
from advmoe_jax.runs import build
from advmoe_jax.runs.build import ImageKind, Images
from advmoe_jax.training.checkpoint import Checkpointer, OtherState, tree_sha256
from advmoe_jax.types import Tree

CONFIG = "config.json"
# What the images of the run are, so that it is understood without them.
IMAGES = "images.json"
# What a directory has that holds a comparison, and no run.
COMPARISON = "comparison.json"
# The first while a run is trained; the second, which is small, once it is closed.
CHECKPOINTS, WEIGHTS = "checkpoints", "weights"

# What orbax's search for the parts of a checkpoint takes for a pattern: it then finds none of them,
# or those of a neighbour, and what was saved is lost.
_PATTERN = "*?[]\\"


class Weights(NamedTuple):
    """Parameters and statistics of one checkpoint, or their averages if it has them."""

    step: int
    params: Tree
    stats: Tree

    @property
    def sha256(self) -> str:
        """The digest of all arrays."""
        return tree_sha256((self.params, self.stats))


def located(path: str, flag: str = "workdir") -> Path:
    """A run's directory as a user wrote it, on this machine or in a bucket.

    Args:
        path: the user's words.
        flag: where they stood.

    Raises:
        UserError: if the path is of a storage that is not supported or not installed, or is not
            UTF-8.
    """
    try:
        workdir = storage.path_of(path)
    except UserError as error:
        raise UserError(f"--{flag}={error}") from None
    try:
        _spelled(workdir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--{flag}={path!a} lies at a path that is not UTF-8: name another directory"
        ) from None
    return workdir


def create(path: str) -> Path:
    """Makes a run's directory.

    Raises:
        UserError: if the path cannot be a directory that we may write, or checkpoints would be lost
            in it.
    """
    workdir = located(path)
    if found := [x for x in _PATTERN if x in _spelled(workdir)]:
        raise UserError(
            f"--workdir={path}: the path {_spelled(workdir)} has {found[0]!r} in it, which the "
            f"checkpoints' library takes for a pattern; use a path without {' '.join(_PATTERN)}"
        )
    use_compilation_cache(_made(path, workdir, "workdir"))
    return workdir


def _spelled(workdir: Path) -> str:
    return str(workdir if storage.is_remote(workdir) else workdir.absolute())


def make(directory: Path) -> None:
    """Makes a directory; in a bucket they are in the names of objects alone."""
    if not storage.is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)


def _made(path: str, directory: Path, flag: str) -> Path:
    try:
        make(directory)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--{flag}={path} cannot be made: {error.strerror}") from None
    return directory


def create_beside(path: str) -> Path:
    """Makes a directory for what is found of a run that lies elsewhere.

    Raises:
        UserError: if it cannot be made, or holds a run or a comparison of its own.
    """
    out = located(path, "out")
    if (out / CONFIG).exists() or (out / COMPARISON).exists() or _has_checkpoints(out):
        raise UserError(
            f"--out={path} holds a run or a comparison, whose results would be lost: name another "
            "directory"
        )
    return _made(path, out, "out")


def use_compilation_cache(workdir: Path) -> None:
    """Keeps compiled programs beside the runs, so that resuming and evaluating start at once.

    JAX_COMPILATION_CACHE_DIR, if set, says where instead. Beside a run in a bucket nothing is kept,
    since JAX would ask there for every program. An explanation is made of many programs that take
    less than the second from which JAX keeps them.
    """
    if not jax.config.jax_compilation_cache_dir and not storage.is_remote(workdir):
        cache = workdir.absolute().parent / ".jax_cache"
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a directory.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    return config_lib.load(workdir / CONFIG)


def write_kind(workdir: Path, kind: ImageKind) -> None:
    """Notes in a run's directory what its images are."""
    write_json(workdir / IMAGES, kind._asdict())


def read_kind(workdir: Path) -> ImageKind | None:
    """What ``write_kind`` wrote; None if nothing was.

    Raises:
        UserError: if the file is damaged.
    """
    found = read_json(workdir / IMAGES)
    return None if found is None else as_kind(found, workdir / IMAGES)


def as_kind(found: Any, path: Path) -> ImageKind:
    """What images are, read from JSON.

    Args:
        found: what was read.
        path: where, for messages.

    Raises:
        UserError: if it is not what ``ImageKind`` has.
    """
    try:
        kind = ImageKind(found["name"], tuple(found["shape"]), tuple(found["class_names"]))
    except (KeyError, TypeError):
        kind = ImageKind("", (), ())
    sizes = [x for x in kind.shape if isinstance(x, int) and 0 < x <= config_lib.MOST]
    names = [x for x in (kind.name, *kind.class_names) if isinstance(x, str)]
    is_whole = len(sizes) == len(kind.shape) == 3 and len(names) == len(kind.class_names) + 1
    if not is_whole or len(kind.class_names) < 2:
        raise UserError(f"{path} is damaged: it does not say what the run's images are")
    return kind


def claim(workdir: Path, config: ConfigDict) -> None:
    """Makes the directory this config's.

    A run that was moved here may find its data, and the runs it builds on, elsewhere than before.

    Raises:
        UserError: if it holds a comparison, or checkpoints of another config.
    """
    path = workdir / CONFIG
    if (workdir / COMPARISON).exists():
        raise UserError(f"{workdir} holds a comparison, and no run: use another --workdir")
    _check_places(workdir)
    # Before the first checkpoint there is nothing to protect: a mistyped try binds nobody.
    if _has_checkpoints(workdir):
        if path.exists():
            _refuse_other(workdir, config, config_lib.load(path))
        with open_checkpoints(config, workdir) as checkpointer:
            owner = checkpointer.saved_owner()
        if owner not in (None, config_lib.fingerprint(config)):
            raise UserError(
                f"{workdir} holds checkpoints of another config than this command's, and its "
                f"{CONFIG} is missing or was changed: use another --workdir"
            )
    if jax.process_index() == 0:
        config_lib.save(config, path)


def _check_places(workdir: Path) -> None:
    """Raises UserError if what training goes on from, or adds to, cannot be read."""
    for path in (workdir / CHECKPOINTS, workdir / WEIGHTS):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is no directory; move it away and give the command again")
    read_results(workdir)
    read_metrics(workdir / METRICS)


def _refuse_other(workdir: Path, config: ConfigDict, theirs: ConfigDict) -> None:
    if (name := config_lib.difference(config, theirs)) is not None:
        raise UserError(
            f"{workdir} holds a run with {name}={config_lib.value(theirs, name)!r}, this "
            f"command has {config_lib.value(config, name)!r}: use another --workdir"
        )


def claim_for_comparison(root: Path, config: ConfigDict) -> None:
    """Makes the directory a comparison's; another table of the same comparison is welcome.

    Raises:
        UserError: if it holds a run.
    """
    if (root / CONFIG).exists() or _has_checkpoints(root):
        raise UserError(f"{root} holds a run, and no comparison: use another --workdir")
    config_lib.save(config, root / COMPARISON)


def _has_checkpoints(workdir: Path) -> bool:
    return is_closed(workdir) or (workdir / CHECKPOINTS).exists()


def open_checkpoints(config: ConfigDict, workdir: Path) -> Checkpointer:
    """The checkpoints of the run in ``workdir``; if it is closed, they hold the weights alone."""
    name = WEIGHTS if is_closed(workdir) else CHECKPOINTS
    return Checkpointer(workdir / name, config.checkpoint.keep, config_lib.fingerprint(config))


def is_closed(workdir: Path) -> bool:
    """Whether the run in ``workdir`` is trained to its end, and ``close`` has been called."""
    return storage.is_whole(workdir / WEIGHTS)


def close(config: ConfigDict, workdir: Path) -> None:
    """Leaves of the checkpoints of a run that has ended what evaluations read, in ``weights``.

    That is parameters and statistics (or their averages), the last and the best, without the
    optimizers' states: the directory becomes small. The run cannot be trained any further.
    """
    if not is_closed(workdir):
        parts = ("state/average/",) if config.ema_decay else ("state/params/", "state/stats/")
        with open_checkpoints(config, workdir) as checkpointer:
            checkpointer.extract(workdir / WEIGHTS, lambda name: name.startswith(parts))
    storage.remove_tree(workdir / CHECKPOINTS)


def restore(
    config: ConfigDict, workdir: Path, which: str, like: tuple[Tree, Tree]
) -> tuple[Weights, Weights]:
    """The last checkpoint's weights, and those of the checkpoint to evaluate.

    Args:
        config: of the run.
        workdir: the run's directory.
        which: to evaluate, ``best`` by the validation split or ``last``.
        like: parameters and statistics of the network, or their shapes; what is restored lies on
            their devices.

    Raises:
        UserError: if there is no intact checkpoint, or it is of another network.
    """
    wanted = {"params": like[0], "stats": like[1]}
    if config.ema_decay:
        wanted = {"average": wanted}

    def read(restore: Callable[[Tree], tuple[int, Tree] | None]) -> Weights | None:
        found = restore({"state": wanted})
        return found and Weights(found[0], **found[1]["state"].get("average", found[1]["state"]))

    try:
        with open_checkpoints(config, workdir) as checkpointer:
            last = read(checkpointer.restore_latest)
            best = read(checkpointer.restore_best) if which == "best" else last
    except OtherState as error:  # an imported network may have other classes than the data
        raise UserError(f"{error}; is config.data what the network was trained on?") from None
    if last is None or best is None:
        first = (
            f"remove {workdir / WEIGHTS} and train again" if is_closed(workdir) else "train first"
        )
        raise UserError(f"{workdir} has no intact checkpoint to evaluate; {first}")
    return last, best


def restore_network(
    config: ConfigDict, workdir: Path, images: Images | ImageKind, which: str = "best"
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
    network, *like = build.network_shapes(config, images.shape[-1], len(images.class_names))
    weights = restore(config, workdir, which, tuple(like))[1]
    return network, weights.params, weights.stats


def check_kind(workdir: Path, kind: ImageKind) -> None:
    """Raises UserError if a run is of other classes, or of images of another shape."""
    known = read_kind(workdir)
    if known is None:
        return
    for name in ("shape", "class_names"):
        here, there = getattr(kind, name), getattr(known, name)
        if here != there:
            raise UserError(
                f"the data at hand have {name}={here}, {workdir} is of {name}={there}: give the "
                "data that it was trained on, or use another --workdir"
            )


def restore_other(directory: str, model: Mapping[str, Any], like: tuple[Tree, Tree]) -> Weights:
    """The best checkpoint of another run, to start from.

    Args:
        directory: of the other run.
        model: values that its config's ``model`` must have.
        like: parameters and statistics of its network.

    Raises:
        UserError: if there is no such run, or it is of another network.
    """
    workdir = storage.path_of(directory)
    config = read_config(workdir)
    if not set(config.model.to_dict()) <= set(model):
        raise UserError(f"{workdir} is no run of this network: it is of another family of models")
    for name, value in config.model.to_dict().items():
        # JSON turns tuples into lists.
        if json.loads(json.dumps(model[name])) != json.loads(json.dumps(value)):
            raise UserError(
                f"{workdir} is no run of this network: it has model.{name}={value!r}, "
                f"this one {model[name]!r}"
            )
    return restore(config, workdir, "best", like)[1]


def identity(which: str, weights: Weights) -> dict[str, Any]:
    """Which checkpoint numbers are of, as results say it."""
    return {"checkpoint": which, "step": weights.step, "params_sha256": weights.sha256}
