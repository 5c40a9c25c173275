"""HYDRA on channels: a Sparse network's scores are learned first, then its kernels.

Sehwag et al., NeurIPS 2020, with whole channels in the place of single weights; see
``models.sparse``.
"""

from collections.abc import Mapping

from jax import lax

from advmoe_jax.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.models.sparse import scores_of
from advmoe_jax.training.methods.adversarial import trades
from advmoe_jax.training.methods.step import Method, Settings, Setup, Start, Step, answers_of
from advmoe_jax.training.state import TrainState
from advmoe_jax.types import Array, Tree


def _hydra(setup: Setup) -> Step:
    learn_scores = trades(setup, answers_of, ["scores"], surrogate=True)
    train_kernels = trades(setup, answers_of, ["backbone"], surrogate=False)

    def step(
        state: TrainState, images: Array, labels: Array, keys: Array
    ) -> tuple[TrainState, Tree]:
        is_pruning = state.step < setup.settings.pruning_steps
        return lax.cond(is_pruning, learn_scores, train_kernels, state, images, labels, keys)

    return step


def _is_sparse(network: Network, settings: Settings) -> None:
    if "scores" not in network.parts:
        raise UserError(
            "method='hydra' prunes channels, but model.keep=1.0 keeps all: set it below 1; "
            "python -m advmoe_jax.cost --target=... finds the value for a cost"
        )


def _with_scores(initial: Tree, trained: Tree) -> Tree:
    scores = scores_of(trained["backbone"], initial["scores"])
    return {"backbone": trained["backbone"], "scores": scores}


def _lengths(num_epochs: int, pruning_epochs: int) -> Mapping[str, int]:
    if not 0 < pruning_epochs < num_epochs:
        raise UserError(
            f"pruning.epochs={pruning_epochs} must lie between 1 and "
            f"num_epochs-1={num_epochs - 1}: channels are chosen first, then kernels trained"
        )
    return {"scores": pruning_epochs, "backbone": num_epochs - pruning_epochs}


HYDRA = Method(
    "TRADES' loss for a Sparse network: its channel scores first, its kernels frozen; then its "
    "kernels, the channels chosen (Sehwag et al., NeurIPS 2020)",
    _hydra,
    check=_is_sparse,
    start=Start(
        run="pruning.dense_run",
        missing="method='hydra' prunes a trained dense network: set pruning.dense_run to the "
        "workdir of one, trained with --config.model.keep=1 --config.method=trades, say",
        trained_as={"keep": 1.0},
        trained_part=lambda params: {"backbone": params["backbone"]},
        combine=_with_scores,
    ),
    lengths=_lengths,
)
