"""Trains a network and evaluates it: ``python -m advmoe_jax.train --config=... --workdir=...``.

The same command again resumes. See the README for what a run's directory holds.
"""

import jax
from absl import flags
from rich.console import Console

from advmoe_jax import cli, experiment, runs
from advmoe_jax.reports import print_results
from advmoe_jax.training import loop

WORKDIR = cli.workdir_flag("directory of the run; made if missing")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "several hosts: address:port of the first, or 'auto' on TPU and SLURM"
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "several hosts: how many processes")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "several hosts: which one this is")
cli.config_flag()


def main() -> None:
    """Trains, evaluates, and prints where the results lie."""
    config = cli.config_value()
    if COORDINATOR.value == "auto":
        jax.distributed.initialize()
    elif COORDINATOR.value:
        jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    console = Console(quiet=jax.process_index() > 0)
    workdir = experiment.create_workdir(WORKDIR.value)
    runs.claim(workdir, config)  # before the images, which may take a while to read
    try:
        results = runs.complete(config, workdir, experiment.load_images(config), console)
    except loop.Stopped:
        console.print("stopped by SIGTERM; saved: the same command goes on")
        return
    if jax.process_index() == 0:
        print_results(results, console, workdir / "results.json")
        console.print(f"report in {workdir / 'report.html'}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, needs=("config", "workdir"))
