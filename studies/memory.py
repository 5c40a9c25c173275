"""What streaming holds in memory does not grow with the data: ``python -m studies.memory``.

Two data sets of 32x32 JPEG files are prepared, one of as many images as CIFAR-10 has (60,000), one
of ten times as many. A process of its own streams each: batches of 256 to train on, then to measure
on, decoded by threads, and by worker processes if grain is installed. What counts is the peak of
the memory that the system keeps for the process and for its largest worker. Decoded, the large set
would be 1.7 GiB.

Takes about twenty minutes on two busy CPU cores, and 2 GiB of disk. Needs Linux.
"""

import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from absl import flags
from PIL import Image

from advmoe_jax import cli
from advmoe_jax.data import preparing
from advmoe_jax.data.batch import BatchRecipe
from advmoe_jax.data.pipeline import batches_at, evaluation_batches, put
from advmoe_jax.data.sources import carve_validation, load
from advmoe_jax.data.stream import Stream
from advmoe_jax.parallel import data_mesh
from studies.bars import Bar, conclude

IMAGES = flags.DEFINE_integer("images", 60_000, "of the small set", allow_override=True)
STEPS = flags.DEFINE_integer("steps", 300, "batches of each kind", allow_override=True)
WORKERS = flags.DEFINE_integer("workers", 2, "worker processes, with grain", allow_override=True)
MEASURE = flags.DEFINE_string("measure", "", "directory of a set to stream: the study's own use")
TIMES, BATCH, DISTINCT = 10, 256, 500


def main() -> None:
    """Prepares both sets, streams each in processes of their own, and compares."""
    if MEASURE.value:
        print(json.dumps(streamed(MEASURE.value, WORKERS.value, STEPS.value)))
        return
    kinds = [0, WORKERS.value] if importlib.util.find_spec("grain") else [0]
    with TemporaryDirectory() as root:
        small, large = (prepared(Path(root), n * IMAGES.value) for n in (1, TIMES))
        conclude("memory", [bar for workers in kinds for bar in bars(small, large, workers)])


def bars(small: Path, large: Path, workers: int) -> Iterator[Bar]:
    """Ten times the images may cost a tenth more, and 64 MiB of indices and labels."""
    one, ten = (in_a_process(directory, workers) for directory in (small, large))
    how = f"{workers} workers" if workers else "threads"
    for name in one:
        about = f"{how}, {name}: MiB with {TIMES} times the images (as many: {one[name]:,.0f})"
        yield Bar(about, ten[name], 1.1 * one[name] + 64)


def prepared(root: Path, count: int) -> Path:
    """A data_dir with a set of so many images, all to be trained on but for a sixth."""
    files = []
    for seed in range(DISTINCT):
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((32, 32)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    archive, data_dir = root / f"{count}.tar", root / str(count)
    with tarfile.open(archive, "w") as tar:
        for number in range(count):
            split = "train" if number % 6 else "test"
            member = tarfile.TarInfo(f"{split}/{number % 10}/{number}.jpg")
            content = files[number % DISTINCT]
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    plan = preparing.plan("synthetic", str(archive), str(data_dir))
    plan.directory.mkdir(parents=True)
    if damaged := preparing.write(plan):
        raise SystemExit("\n".join(damaged))
    archive.unlink()
    return data_dir


def in_a_process(data_dir: Path, workers: int) -> dict[str, float]:
    """What ``streamed`` says of a process that does nothing else."""
    command = [sys.executable, "-m", "studies.memory", f"--measure={data_dir}"]
    command += [f"--workers={workers}", f"--steps={STEPS.value}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def streamed(data_dir: str, workers: int, steps: int) -> dict[str, float]:
    """Peaks of resident memory, in MiB, after streaming both kinds of batches."""
    mesh = data_mesh(1)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    dataset = load("tfds:synthetic", data_dir, stream=True)
    train, validation = carve_validation(dataset.train, 0.1, 0)
    stream = Stream(train, mesh, BatchRecipe(BATCH), workers)
    of_workers = 0.0
    for batch in stream.batches(jax.random.key(0), jax.random.key(1), 0, steps):
        jax.block_until_ready(batch)
        of_workers = max([of_workers, *(peak(p.pid) for p in multiprocessing.active_children())])
    for split in (validation, dataset.test):
        indices = [at for at, _ in evaluation_batches(len(split.labels), BATCH)][:steps]
        for batch in batches_at(put(split, mesh), mesh, indices):
            jax.block_until_ready(batch)
    found = {"the process": peak(os.getpid())}
    return found | ({"its largest worker": of_workers} if workers else {})


def peak(process: int) -> float:
    """MiB; ``getrusage`` would count what the parent had when the process was started."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:  # it has ended
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)  # a process that is ending has no memory
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    cli.run(main)
