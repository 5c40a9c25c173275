"""Scaling: eight virtual CPU devices against one, on the same cores and the same global batch.

The number of devices is fixed when JAX starts, so each side is a process of its own; both live at
the same time and run in turn, one step each.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from advmoe_jax.evaluation.timing import Timing, ratio
from benchmarks.figures import Figure

SUITE, NETWORK, DEVICES, ROUNDS = "scaling", "resnet18_cifar", 8, 5


def figures(batch: int) -> Iterator[Figure]:
    """One row on ``batch`` images; on CPU whatever the other suites run on."""
    one, many = _Side(1, batch), _Side(DEVICES, batch)
    with one, many:
        for side in (one, many):
            side.step()
        taken = [(one.step(), many.step()) for _ in range(ROUNDS)]
    of_one, of_many = (Timing(tuple(seconds)) for seconds in zip(*taken, strict=True))
    yield Figure(
        SUITE,
        f"{NETWORK} MoE, batch {batch}: images/s of an AdvMoE step on {DEVICES} virtual CPU devices"
        " over 1",
        ratio(of_one, of_many),
        0.85,
        at_least=True,
    )


class _Side:
    """A process with its own number of devices, which runs one step a line and says how long."""

    def __init__(self, devices: int, batch: int) -> None:
        flag = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(batch)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def step(self) -> float:
        """Seconds of one step."""
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def _serve(batch: int) -> None:
    import jax
    from jax.sharding import PartitionSpec as P

    from advmoe_jax.parallel import DATA_AXIS, data_mesh, parallel, replicate
    from advmoe_jax.training import create_state
    from benchmarks.networks import advmoe_step, moe, random_batch

    images, labels = random_batch(batch)
    bound = moe(NETWORK, images)
    step, optimizers = advmoe_step(bound.network, DATA_AXIS)
    mesh = data_mesh()
    spread = P(DATA_AXIS)
    run = parallel(step, mesh, in_specs=(P(), spread, spread, spread), donate=(0,))
    state = replicate(create_state(bound.params, bound.stats, optimizers), mesh)
    keys = jax.random.split(jax.random.key(0), batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(run(state, images, labels, keys))
        del metrics
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
