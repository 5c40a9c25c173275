"""What network a checkpoint of the published code is of."""

import re

from advmoe_jax.errors import UserError
from advmoe_jax.models.cnn import CNN, RouterSettings
from advmoe_jax.published import rdi
from advmoe_jax.published.torch_checkpoint import TorchCheckpoint
from advmoe_jax.published.torch_names import WITHOUT_NORMALIZATION


def network_of(
    checkpoint: TorchCheckpoint,
    *,
    name: str,
    num_experts: int,
    ratio: float | None = None,
    width: int = 0,
    normalize: str = "auto",
    raw_widening: bool | None = None,
) -> CNN:
    """The network that is told here and by the file.

    Args:
        checkpoint: what ``torch_checkpoint.read`` returned.
        name: of the network, such as ``resnet18_cifar``.
        num_experts: experts per convolution; 1: a dense network, as all of RDI-Nets' are.
        ratio: width of one pathway; None: 0.5, or 1 for a dense network.
        width: channels of the first layer at ratio 1; 0: published.
        normalize: ``file``: as the file says; ``none``; ``auto``: as the published code would.
        raw_widening: see ``CNN``; None: as published.

    Raises:
        UserError: if the file lacks the router or the normalisation that is asked for.
    """
    if name in rdi.NETWORKS:
        has_exits = any(key.startswith("branch_layer") for key in checkpoint.tensors)
        exits = rdi.NETWORKS[name].exits if has_exits else ()
        ratio = 1.0 if ratio is None else ratio
        return CNN(name, ratio=ratio, exits=exits, mean=(0.0,), std=(1.0,))
    dense = num_experts == 1
    # Of the published wide ResNets, the dense CIFAR form alone widens activations.
    is_raw = name.startswith("wrn_") and not (dense and name.endswith("_cifar"))
    mean, std = _normalization(checkpoint, name, normalize)
    return CNN(
        name,
        num_experts=num_experts,
        ratio=(1.0 if dense else 0.5) if ratio is None else ratio,
        width=width,
        raw_widening=is_raw if raw_widening is None else raw_widening,
        mean=mean,
        std=std,
        router=RouterSettings() if dense else _router(checkpoint),
    )


def _normalization(
    checkpoint: TorchCheckpoint, name: str, normalize: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the file's, or none at all where the published code would not normalise."""
    ignored = normalize == "auto" and name.startswith(WITHOUT_NORMALIZATION)
    if checkpoint.mean is None or checkpoint.std is None:
        if normalize == "file":
            raise UserError("the checkpoint holds no normalisation: give --normalize=none or auto")
        ignored = True
    if ignored or normalize == "none":
        return (0.0,), (1.0,)
    return checkpoint.mean, checkpoint.std


def _router(checkpoint: TorchCheckpoint) -> RouterSettings:
    """The file's router, one for the whole network at full resolution."""
    stem = checkpoint.tensors.get("router.conv1.weight")
    if stem is None:
        raise UserError(
            "the checkpoint holds no router: give --num_experts=1 if it is of a dense network"
        )
    blocks = [re.fullmatch(r"router\.layer1\.\d+\.conv1\.weight", x) for x in checkpoint.tensors]
    return RouterSettings(
        width=max(1, *stem.shape[:1]), blocks=max(1, sum(map(bool, blocks))), resolution=0
    )
