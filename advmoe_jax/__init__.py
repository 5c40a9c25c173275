"""AdvMoE in JAX: adversarially robust mixture-of-experts image classifiers.

What a notebook imports::

    import advmoe_jax as am

    run = am.load("zoo:digits-advmoe")
    run.attack("autoattack", *run.images.test)

``load`` gives a trained run, ``fit`` trains one by a config (of ``defaults``), ``model`` makes an
untrained network by name, ``from_torch`` makes a function of a PyTorch model. The rooms
``attacks``, ``models``, ``training``, ``evaluation``, ``routing``, ``data``, ``runs`` and
``reports`` have the rest. All of it is loaded when it is first named: importing this alone loads
none of it, nor JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advmoe_jax.errors import UserError
    from advmoe_jax.models import model
    from advmoe_jax.runs import Attacked, Run, fit, load
    from advmoe_jax.torch_function import from_torch

__version__ = "0.1.0"

_ROOMS = (
    "attacks",
    "config",
    "data",
    "defaults",
    "evaluation",
    "models",
    "reports",
    "routing",
    "runs",
    "training",
)
# Where the other names are.
_FROM = {
    "Attacked": "runs",
    "Run": "runs",
    "UserError": "errors",
    "fit": "runs",
    "from_torch": "torch_function",
    "load": "runs",
    "model": "models",
}

__all__ = ["Attacked", "Run", "UserError", "fit", "from_torch", "load", "model", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
