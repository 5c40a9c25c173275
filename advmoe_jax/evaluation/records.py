"""What an attack is to an evaluation: a record of its kind, and one of what is asked of it.

An attack is one ``Record``, in a file of its family; ``named_attacks.ATTACKS`` lists them.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from advmoe_jax.attacks import Threat
from advmoe_jax.evaluation import views
from advmoe_jax.models.network import Network
from advmoe_jax.types import Array, Images, Tree


class Protocol(NamedTuple):
    """What all attacks of an evaluation share unless they say otherwise.

    Attributes:
        threat: the ball and the pixel range.
        step_size: of PGD, in units of the pixel range.
        restarts: of PGD and APGD.
    """

    threat: Threat
    step_size: float
    restarts: int = 1


class NamedAttack(NamedTuple):
    """An attack on a whole network: words alone, so that equal ones share what is compiled.

    Attributes:
        name: as the user wrote it; ``@norm-epsilon`` behind it under another threat model than
            the protocol's.
        record: what is known of its kind.
        threat: the ball that its images are checked against.
        num_steps: of the attack, or queries.
        step_size: of PGD.
        restarts: of PGD and APGD.
        num_exits: of the network that is attacked, once it is known.
    """

    name: str
    record: "Record"
    threat: Threat
    num_steps: int
    step_size: float
    restarts: int
    num_exits: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What stands beside its numbers: norm, epsilon, steps, ...; {} if nothing is perturbed."""
        own = self.record.settings(self)
        return {"norm": self.threat.norm, "epsilon": self.threat.epsilon} | own if own else {}

    @property
    def warnings(self) -> list[str]:
        """What its numbers must not be read without."""
        reach = self.num_steps * self.step_size
        is_free = "step_size" in self.settings and not self.record.reaches_edge
        if not is_free or reach >= self.threat.epsilon * (1 - 1e-6):  # but for rounding
            return []
        return [
            f"{self.num_steps} steps of {self.step_size:.3g} reach {reach:.3g} of epsilon="
            f"{self.threat.epsilon:.3g}: the network looks more robust than it is"
        ]

    @property
    def is_ensemble(self) -> bool:
        """Whether it runs image by image on what is left, instead of in one program."""
        return self.record.is_ensemble

    def perturb(
        self,
        network: Network,
        params: Tree,
        stats: Tree,
        images: Images,
        labels: Array,
        keys: Array,
    ) -> Images:
        """The adversarial images of a batch; ``keys`` [B]. Not for ensembles."""
        function = self.record.view(network, params, stats)
        attack = _made(self._replace(num_exits=network.num_exits))
        return attack(function, images, self.record.target(network, labels), keys)

    def run(
        self, network: Network, params: Tree, stats: Tree, *arguments: Any, **options: Any
    ) -> Any:
        """What an ensemble finds; further arguments as ``attacks.autoattack``'s function has."""
        function = self.record.view(network, params, stats)
        return _made(self._replace(num_exits=network.num_exits))(function, *arguments, **options)

    def check(self) -> None:
        """Raises ValueError if the attack cannot be made."""
        _made(self)


class Record(NamedTuple):
    """All that is known of a kind of attack.

    Attributes:
        make: makes the attack, or the ensemble.
        settings: what stands beside its numbers, besides the ball.
        steps: how many the name stands for; None: it must say.
        is_counted: whether the name may end in a number of steps.
        view: the function of the network that is attacked.
        needs: a part that the network must have; empty: none.
        target: (network, labels) -> what the attack's loss compares with.
        is_ensemble: see ``NamedAttack``.
        reaches_edge: whether its steps are made for the ball, and not of the protocol's size.
        side_exit: number, from 1, of the side exit that it is on; 0: none.
        needs_route: whether the network must have a router besides.
        about: what it does, for people who choose.
    """

    make: Callable[[NamedAttack], Any]
    settings: Callable[[NamedAttack], dict[str, Any]]
    steps: int | None = 0
    is_counted: bool = False
    view: views.View = views.logits
    needs: str = ""
    target: Callable[[Network, Array], Array] = lambda network, labels: labels
    is_ensemble: bool = False
    reaches_edge: bool = False
    side_exit: int = 0
    needs_route: bool = False
    about: str = ""


# The same attack for the same words, so that what is compiled for one network serves the next.
@lru_cache(maxsize=64)
def _made(attack: NamedAttack) -> Any:
    return attack.record.make(attack)
