"""Explains a trained run by its routes: ``explanation.json``, and the figures of it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.data.augment import to_float
from advmoe_jax.data.sources import Split
from advmoe_jax.evaluation import explanation, lipschitz, results, token_routes
from advmoe_jax.evaluation.certified import certified_agreement
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import NamedAttack, Protocol
from advmoe_jax.evaluation.results import read_results
from advmoe_jax.files import write_bytes, write_json
from advmoe_jax.models.network import Network
from advmoe_jax.models.trunk import with_thresholds
from advmoe_jax.parallel import data_mesh
from advmoe_jax.reports import explanation_figures, token_figures
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.directory import Weights
from advmoe_jax.runs.lock import locked
from advmoe_jax.types import Array, Tree

# Images whose slopes are measured.
_SLOPES = 64
# What an attack on the router alone adds to an explanation.
_OF_ROUTER_ATTACK = ("agreement", "confusion", "accuracy")


def explain(
    config: ConfigDict,
    workdir: Path,
    images: Images,
    *,
    attack: str,
    examples: int = 0,
    which: str = "best",
) -> Tree:
    """Explains the run in ``workdir`` on its test split; the next report shows it.

    Args:
        config: of the run.
        workdir: the run's directory.
        images: of the run.
        attack: on the whole network, see ``evaluation.named_attacks``.
        examples: number of test images; 0 for all.
        which: ``best`` by the validation split, or ``last``.

    Returns:
        The content of ``explanation.json``.

    Raises:
        UserError: if there is no checkpoint to explain, the attack cannot be made, or another
            process explains this run.
    """
    with locked(workdir, "explanation"):
        return _explain(config, workdir, images, attack, examples, which)


def _explain(
    config: ConfigDict, workdir: Path, images: Images, attack: str, examples: int, which: str
) -> Tree:
    directory.check_kind(workdir, images.kind)
    mesh = data_mesh(1)
    network, *like = build.network_shapes(config, images.shape[-1], len(images.class_names))
    protocol = build.protocol(config)
    named = explanation.explained_attack(attack, protocol, network.parts)
    _, weights = directory.restore(config, workdir, which, tuple(like))
    weights = _as_evaluated(workdir, weights)
    test, key = build.subset(images.test, examples), build.keys(config.seed).evaluation
    test = Split(*map(np.asarray, test))  # they may be decoded only here
    of_network = (network, weights.params, weights.stats, test)
    batch_size = config.evaluation.batch_size

    def see(named: NamedAttack) -> tuple[dict[str, Any] | None, explanation.Seen]:
        seen = explanation.see(*of_network, named, key, batch_size)
        size = (network.num_experts, len(images.class_names), network.num_routers)
        return explanation.describe(seen, *size), seen

    routing, seen = see(named)
    found = {
        "evaluated": directory.identity(which, weights),
        "examples": len(test.labels),
        "seed": config.seed,
        "class_names": list(images.class_names),
        "attack": {"name": named.name, **named.settings},
        "routing": routing,
        "curve": explanation.robust_accuracies(*of_network, protocol, key, batch_size),
        **results.provenance(mesh.size),
    }
    certified = certified_agreement(*of_network, protocol.threat, batch_size)
    if certified is not None:
        found["routing"]["certified_agreement"] = certified
        ball = protocol.threat.norm, float(protocol.threat.epsilon)
        found["routing"]["certified_within"] = list(ball)
    if network.is_moe:
        on_router = named_attack("router_kl", protocol, network.parts)
        alone = see(on_router)[0]
        found["router_attack"] = {
            "name": on_router.name,
            **on_router.settings,
            **{name: alone[name] for name in _OF_ROUTER_ATTACK},
        }
    if config.family == "vit":
        found |= _of_tokens(seen, of_network, protocol, key, batch_size)
    if jax.process_index() == 0:
        write_json(workdir / explanation.FILE, found)
        figures = explanation_figures(found, seen, test.images)
        for name, png in (figures | token_figures(found, seen, test.images)).items():
            write_bytes(workdir / name, png)
    return found


def _as_evaluated(workdir: Path, weights: Weights) -> Weights:
    """The weights with the thresholds of the run's results, if those are of the same weights."""
    results = read_results(workdir) or {}
    is_same = results.get("evaluated", {}).get("params_sha256") == weights.sha256
    if not is_same or (exits := results.get("exits")) is None:
        return weights
    stats = with_thresholds(weights.stats, np.array(exits["thresholds"]))
    return weights._replace(stats=stats)


def _of_tokens(
    seen: explanation.Seen,
    of_network: tuple[Network, Tree, Tree, Split],
    protocol: Protocol,
    key: Array,
    batch_size: int,
) -> Tree:
    """What is told of a transformer besides: slopes, and, of a mixture, the routes of tokens.

    Returns:
        ``prediction_changes``, the share of images; ``lipschitz``, see ``lipschitz.measured``, of
        the first few images, in the norms linf and l2; ``tokens`` of a mixture: ``changes``, and
        what ``token_routes.importance_of_routes`` and ``neighbours`` say.
    """
    network, params, stats, test = of_network
    found: Tree = {"prediction_changes": float((seen.clean != seen.attacked).mean())}
    if protocol.threat.norm in ("linf", "l2"):
        some = (to_float(test.images[:_SLOPES]), seen.adversarial[:_SLOPES], test.labels[:_SLOPES])
        found["lipschitz"] = lipschitz.measured(network, params, stats, *some, protocol.threat)
    if not token_routes.are_routed(network):
        return found
    grid, has_class_token = token_routes.grid_of(network)
    asked = (test, seen.adversarial, protocol, key, batch_size)
    found["tokens"] = {
        "grid": grid,
        "has_class_token": has_class_token,
        "changes": token_routes.changes(seen, network),
        **token_routes.importance_of_routes(network, params, stats, *asked),
        "neighbours": token_routes.neighbours(network, params, stats, test, batch_size),
    }
    return found
