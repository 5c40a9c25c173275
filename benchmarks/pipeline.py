"""Images from files to batches: how many a second each worker decodes, and how long a step waits.

JPEG files of 32x32, and of 500x375 that crops of 224x224 are cut out of, all in the system's cache:
the disk is not measured.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from advmoe_jax.data.ahead import made
from advmoe_jax.data.augment import augment, to_float
from advmoe_jax.data.batch import BatchRecipe
from advmoe_jax.data.decoding import Encoded
from advmoe_jax.data.encoded import EncodedImages
from advmoe_jax.data.sources import Split
from advmoe_jax.data.stream import HostBatches, Stream
from advmoe_jax.evaluation.timing import alternate
from advmoe_jax.parallel import data_mesh
from advmoe_jax.training import create_state
from benchmarks.figures import Figure
from benchmarks.networks import advmoe_step, moe, random_batch
from benchmarks.programs import compiled

SUITE, FILES, SECONDS, STEPS = "pipeline", 256, 5.0, 5
MOST_BATCHES = 5000  # more than are made in that time
# Side of an image in a batch -> (width, height) of the files, least area of a crop.
KINDS = {32: ((32, 32), 1.0), 224: ((500, 375), 0.08)}


def figures(batch: int) -> Iterator[Figure]:
    """Rows for both kinds of files, then for steps that are fed with the small ones."""
    workers = sorted({1, os.cpu_count() or 1})
    with TemporaryDirectory() as folder:
        for side, (size, area) in KINDS.items():
            split = _split(Path(folder), side, size, max(FILES, batch))
            for count in workers:
                yield Figure(
                    SUITE,
                    f"JPEG of {size[0]}x{size[1]} to {side}x{side}, batches of {batch},"
                    f" {count} worker(s): images a second of each",
                    _decoded(split, batch, area, count) / count,
                    unit="images/s",
                )
            yield Figure(
                SUITE,
                f"{side}x{side}, batch {batch}: padded crop and flip on the device",
                _augmented(side, batch),
                unit="images/s",
            )
            if side == 32:
                for count in (0, *workers):
                    yield Figure(
                        SUITE,
                        f"AdvMoE step of resnet18_cifar, batch {batch}, {count} worker(s): share of"
                        " its time spent waiting for images",
                        _waiting(split, batch, count),
                        0.05,
                        unit="share",
                    )


def _split(folder: Path, side: int, size: tuple[int, int], count: int) -> Split:
    """Files of soft colours, about as large as photographs of that size are."""
    items = []
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (size[1] // 4, size[0] // 4, 3))
        file = folder / f"{side}-{number}.jpg"
        Image.fromarray(noise.astype(np.uint8)).resize(size).save(file, quality=90)
        items.append(Encoded(file.name, number % 10, file))
    labels = np.array([item.label for item in items], np.int32)
    return Split(EncodedImages(items, (side, side, 3), side), labels)


def _decoded(split: Split, batch: int, area: float, workers: int) -> float:
    """Images a second of all workers, from the first batch on, which they are waited for."""
    draw = np.random.default_rng(0)
    indices = draw.integers(0, len(split.labels), (MOST_BATCHES, batch), np.int32)
    draws = draw.random((*indices.shape, 4), np.float32) if area < 1 else None
    batches = made(HostBatches(split.images, indices, draws, area, threads=1), workers)
    # What is ready when the clock starts was made before.
    for _ in range(3 * workers):
        next(batches)
    began, images = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < SECONDS:
        images += len(next(batches))
    batches.close()
    return images / seconds


def _augmented(side: int, batch: int) -> float:
    images = jnp.zeros((batch, side, side, 3), jnp.uint8)
    keys = jax.random.split(jax.random.key(0), batch)
    program = compiled(lambda x, k: augment(x, k, side // 8, True), images, keys)
    return batch / alternate({"augment": program.call})["augment"].median


def _waiting(split: Split, batch: int, workers: int) -> float:
    """Share of the time of some steps, after the first, in which nothing but images is missing."""
    bound = moe("resnet18_cifar", random_batch(batch)[0])
    step, optimizers = advmoe_step(bound.network)
    keys = jax.random.split(jax.random.key(0), batch)
    state = create_state(bound.params, bound.stats, optimizers)
    run = jax.jit(step)
    stream = Stream(split, data_mesh(1), BatchRecipe(batch, 4, True), workers)
    run_keys = jax.random.key(1), jax.random.key(2)
    batches = stream.batches(*run_keys, 0, STEPS + 1 + 4 * max(workers, 1))
    waited = spent = 0.0
    for number in range(STEPS + 1):
        began = time.perf_counter()
        data = next(batches)
        got = time.perf_counter()
        state, metrics = run(state, to_float(data.images), data.labels, keys)
        jax.block_until_ready(metrics)
        if number:
            waited += got - began
            spent += time.perf_counter() - began
    batches.close()
    return waited / spent
