"""Explains a trained run by its routes: ``explanation.json``, and the figures of it."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from advmoe_jax.evaluation import explanation, results
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.records import NamedAttack
from advmoe_jax.files import write_bytes, write_json
from advmoe_jax.parallel import data_mesh
from advmoe_jax.reports import explanation_figures
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.build import Images
from advmoe_jax.runs.lock import locked
from advmoe_jax.types import Tree

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
    mesh = data_mesh(1)
    network, params, stats = build.create_network(config, images)
    protocol = build.protocol(config)
    named = explanation.explained_attack(attack, protocol, network.parts)
    _, weights = directory.restore(config, workdir, which, (params, stats))
    test, key = build.subset(images.test, examples), build.keys(config.seed).evaluation
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
    if network.is_moe:
        on_router = named_attack("router_kl", protocol, network.parts)
        alone = see(on_router)[0]
        found["router_attack"] = {
            "name": on_router.name,
            **on_router.settings,
            **{name: alone[name] for name in _OF_ROUTER_ATTACK},
        }
    if jax.process_index() == 0:
        write_json(workdir / explanation.FILE, found)
        for name, png in explanation_figures(found, seen, test.images).items():
            write_bytes(workdir / name, png)
    return found
