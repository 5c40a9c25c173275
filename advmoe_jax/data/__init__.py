"""What images exist (sources), how they reach the device, and what a step is fed (batch)."""

from advmoe_jax.data.augment import to_float
from advmoe_jax.data.batch import BatchRecipe, DeviceData, Feed, Mixture, training_batch
from advmoe_jax.data.extra import load_extra
from advmoe_jax.data.pipeline import Resident, evaluation_batches, put
from advmoe_jax.data.sources import Dataset, Split, carve_validation, load
from advmoe_jax.data.stream import Stream

__all__ = [
    "BatchRecipe",
    "Dataset",
    "DeviceData",
    "Feed",
    "Mixture",
    "Resident",
    "Split",
    "Stream",
    "carve_validation",
    "evaluation_batches",
    "load",
    "load_extra",
    "put",
    "to_float",
    "training_batch",
]
