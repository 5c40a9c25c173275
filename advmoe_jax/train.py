"""Trains a network and evaluates it.

Examples:
    python -m advmoe_jax.train --config=configs/digits.py --workdir=runs/digits
    python -m advmoe_jax.train --config=configs/digits.py --workdir=runs/trades \\
        --config.method=trades --config.seed=1
    python -m advmoe_jax.train --config=configs/cifar10_resnet18.py --show

The same command again goes on where it was stopped. The values of a config are in
docs/training.md, the files of a run in docs/runs.md.
"""

import jax
from absl import flags
from rich.console import Console

from advmoe_jax import cli, hosts
from advmoe_jax.reports import print_results
from advmoe_jax.runs import build, directory, training
from advmoe_jax.runs.leaving import check_rule
from advmoe_jax.runs.lock import locked
from advmoe_jax.runs.rehearsal import check_start, rehearse
from advmoe_jax.training import loop

cli.config_flag()
WORKDIR = cli.workdir_flag("directory of the run; made if missing")
SHOW = flags.DEFINE_bool("show", False, "print config, images and cost, and do nothing else")
join_hosts = cli.host_flags()


def main() -> None:
    """Trains, evaluates, and prints where the results lie."""
    if not SHOW.value:
        cli.require("workdir")
    config = build.settled(cli.config_value(), typed=cli.is_typed("evaluation.attacks"))
    check_rule(config)
    if SHOW.value:
        rehearse(config)
        check_start(config)
        training.show(config, build.load_images(config), Console())
        return
    join_hosts()
    rehearse(config)
    check_start(config)
    console = Console(quiet=jax.process_index() > 0)
    workdir = directory.create(WORKDIR.value)
    try:
        with locked(workdir, "training"):
            directory.claim(workdir, config)  # before the images, which may take a while to read
            results = training.complete(config, workdir, build.load_images(config), console)
    except loop.Stopped as stopped:
        cli.stopped(stopped.by, str(stopped), console)
        hosts.leave()
        return
    if jax.process_index() == 0:
        print_results(results, console, workdir / "results.json")
        console.print(f"report in {workdir / 'report.html'}", soft_wrap=True)
    hosts.leave()


if __name__ == "__main__":
    cli.run(main, needs=("config",))
