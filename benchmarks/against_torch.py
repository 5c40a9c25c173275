"""The calls of PyTorch's side of a comparison; PyTorch is optional."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import networks

Call = Callable[[], Any]


def available() -> bool:
    """Whether PyTorch is installed, and for the device that JAX runs on."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return jax.default_backend() == "cpu" or (
        jax.default_backend() == "gpu" and torch.cuda.is_available()
    )


def inference_calls(batch: int) -> dict[str, Call]:
    """``torch dense``, and ``torch moe``: two experts, both computed, and the router."""
    from benchmarks import torch_networks

    images, _, device = _batch(batch)
    dense = torch_networks.ResNet18().to(device)
    experts = torch_networks.ResNet18(2, 0.5).to(device)
    router = torch_networks.Router(2).to(device)
    return {
        "torch dense": _synchronised(torch_networks.inference(dense, None, images)),
        "torch moe": _synchronised(torch_networks.inference(experts, router, images)),
    }


def training_calls(batch: int) -> dict[str, Call]:
    """AdvMoE's step: ``torch published`` with every pass of the published code, ``torch lean``."""
    from benchmarks import torch_networks

    images, labels, device = _batch(batch)
    recipe = torch_networks.Recipe(
        networks.EPSILON, networks.STEP_SIZE, networks.ATTACK_STEPS, networks.BETA
    )

    def call(make: Callable[..., Call]) -> Call:
        experts = torch_networks.ResNet18(2, 0.5).to(device)
        router = torch_networks.Router(2).to(device)
        return _synchronised(make(experts, router, images, labels, recipe))

    return {
        "torch published": call(torch_networks.published_step),
        "torch lean": call(torch_networks.advmoe_step),
    }


def _batch(batch: int) -> tuple[Any, Any, str]:
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(0)
    images = torch.rand(batch, 3, networks.SIZE, networks.SIZE, device=device)
    return images, torch.arange(batch, device=device) % networks.CLASSES, device


def _synchronised(call: Call) -> Call:
    import torch

    if jax.default_backend() != "gpu":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run
