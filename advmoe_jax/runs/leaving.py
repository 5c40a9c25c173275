"""When a run's images leave its network: thresholds chosen on validation images, or as asked."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from advmoe_jax.data import pipeline
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation import views
from advmoe_jax.evaluation.accuracy import Outcome, create_evaluator
from advmoe_jax.evaluation.exit_attacks import check_exits
from advmoe_jax.evaluation.exit_costs import ExitCosts, exit_costs
from advmoe_jax.evaluation.exits import choose_thresholds, sweep
from advmoe_jax.evaluation.named_attacks import named_attack
from advmoe_jax.evaluation.thresholds import Rule, parse_rule
from advmoe_jax.models.network import Network
from advmoe_jax.runs import build
from advmoe_jax.runs.build import Images
from advmoe_jax.types import Tree

SPLITS = ("validation", "test")


class Leaving(NamedTuple):
    """The thresholds of a network, and where they come from.

    Attributes:
        thresholds: one for each side exit, in nats.
        rule: as the user wrote it.
        split: of the images that they were chosen on.
        examples: how many those were.
        costs: of leaving at each exit.
        swept: other thresholds, of a curve; see ``exits.sweep``.
    """

    thresholds: tuple[float, ...]
    rule: str
    split: str
    examples: int
    costs: ExitCosts
    swept: tuple[np.ndarray, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What the numbers must not be read without."""
        if self.split == "validation" or not self.examples:
            return []
        return [
            "thresholds were chosen on the test images that accuracy and MACs are of: for "
            "comparison with published numbers alone"
        ]

    def as_json(self) -> dict[str, Any]:
        """As results say it."""
        return {
            "thresholds": list(self.thresholds),
            "rule": self.rule,
            "chosen_on": f"{self.examples} {self.split} images",
            "costs": self.costs.as_json(),
        }


def check_rule(config: ConfigDict, text: str = "") -> Rule | None:
    """The rule of a run, None for a network without side exits.

    Args:
        config: of the run.
        text: another rule than the config's, or empty.

    Raises:
        UserError: if it is no rule for this network.
    """
    architecture = build.architecture(config)
    if architecture.num_exits == 1:
        if text:
            raise UserError(f"--thresholds={text}: the network has no side exits")
        return None
    rule = parse_rule(text or config.evaluation.thresholds, architecture.num_exits)
    if rule.attack:
        _check_attack(rule, config)
    return rule


def _check_attack(rule: Rule, config: ConfigDict) -> None:
    """Raises UserError unless the attack of a rule perturbs images whenever they leave."""
    architecture = build.architecture(config)
    named = named_attack(rule.attack, build.protocol(config), architecture.parts)
    check_exits([named], architecture.num_exits, "router" in architecture.parts)
    if named.is_ensemble or named.record.view is views.exiting:
        raise UserError(
            f"evaluation.thresholds={rule.text!r}: thresholds cannot be chosen under "
            f"{rule.attack!r}; name an attack that does not look at them, such as pgd20"
        )


def choose(
    config: ConfigDict,
    images: Images,
    network: Network,
    params: Tree,
    stats: Tree,
    mesh: Mesh,
    rule: Rule,
    split: str = "validation",
) -> Leaving:
    """Thresholds for a trained network.

    Args:
        config: of the run.
        images: of the run.
        network: of the run, with side exits.
        params: parameters.
        stats: statistics; what thresholds they have is of no account.
        mesh: the devices.
        rule: how thresholds are chosen.
        split: of the images that they are chosen on, one of ``SPLITS``.
    """
    costs = exit_costs(build.architecture(config), images.shape, len(images.class_names))
    found = {}
    if rule.kind not in ("given", "never"):
        data = getattr(images, split)
        for name in dict.fromkeys(filter(None, ["clean", rule.attack])):
            found[name] = _answers(config, data, network, params, stats, mesh, name)
    if not found:
        side_exits = network.num_exits - 1
        found["clean"] = Outcome(
            *(np.zeros(0),) * 2,
            *(None, None, 0.0),
            exit_correct=np.zeros((0, side_exits + 1), bool),
            entropies=np.zeros((0, side_exits), np.float32),
        )
    thresholds = choose_thresholds(rule, costs, found["clean"], found.get(rule.attack))
    count = len(found["clean"].entropies)
    swept = tuple(sweep(found["clean"])) if count else ()
    return Leaving(tuple(thresholds.tolist()), rule.text, split, count, costs, swept)


def _answers(
    config: ConfigDict,
    data: Any,
    network: Network,
    params: Tree,
    stats: Tree,
    mesh: Mesh,
    attack: str,
) -> Outcome:
    """What every exit says of the images, clean or attacked."""
    named = named_attack(attack, build.protocol(config), network.parts)
    size = min(config.evaluation.batch_size, len(data.labels))
    evaluator = create_evaluator(network, named, mesh, size)
    # Another key than the test images' is drawn from.
    key = jax.random.fold_in(build.keys(config.seed).evaluation, 1)
    return evaluator(params, stats, pipeline.put(data, mesh), key)
