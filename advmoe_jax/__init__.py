"""AdvMoE in JAX: adversarially robust mixture-of-experts image classifiers.

What a notebook imports first: the rooms ``attacks``, ``models``, ``training``, ``evaluation``,
``routing``, ``data``, ``runs`` and ``reports``, each loaded when it is first named, and ``load``
for a trained run. Importing this alone loads none of them, nor JAX.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advmoe_jax.models import Network
    from advmoe_jax.runs import Images
    from advmoe_jax.types import Tree

__version__ = "0.1.0"

_ROOMS = ("attacks", "data", "evaluation", "models", "reports", "routing", "runs", "training")

__all__ = ["load", *_ROOMS]


def load(workdir: str | Path, which: str = "best") -> "tuple[Network, Tree, Tree, Images]":
    """A trained run, for a notebook: its network, parameters, statistics and images.

    Args:
        workdir: the run's directory.
        which: ``best`` by the validation split, or ``last``.

    Raises:
        UserError: if the directory holds no run with an intact checkpoint, or the run's images are
            not where its config says.
    """
    from advmoe_jax import runs

    workdir = Path(workdir).expanduser()
    config = runs.read_config(workdir)
    images = runs.load_images(config)
    return *runs.restore_network(config, workdir, images, which), images


def __getattr__(name: str) -> ModuleType:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
