"""Writes a folder or an archive of images as a data set that streams.

Examples:
    python -m advmoe_jax.prepare --dataset=tiny_imagenet --source=tiny-imagenet-200.zip \\
        --data_dir=data
    python -m advmoe_jax.prepare --dataset=mine --source=images --data_dir=data \\
        --splits=train,test

Training reads it with --config.data.source=tfds:tiny_imagenet --config.data.path=data.
Every image is decoded once; those that cannot be are named. The same command again goes on
where it was stopped, and changes nothing if all is there. docs/data.md says more.
"""

import sys
from functools import partial

from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from advmoe_jax import cli
from advmoe_jax.data import preparing
from advmoe_jax.errors import UserError
from advmoe_jax.heartbeat import heartbeat, shows_bars
from advmoe_jax.runs import directory
from advmoe_jax.runs.lock import locked

DATASET = flags.DEFINE_string("dataset", None, "name of the data set, such as tiny_imagenet")
SOURCE = flags.DEFINE_string(
    "source", None, "directory or archive (.tar.gz, .tgz, .tar, .zip) of <split>/<class>/*.jpg"
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "directory of data sets; made if missing")
SPLITS = flags.DEFINE_list(
    "splits",
    [],
    "comma-separated; empty: train, and of val, validation, test those with classes",
)


def main() -> None:
    """Prepares, and says what there is."""
    console = Console(highlight=False, soft_wrap=True)
    data_dir = directory.located(DATA_DIR.value, "data_dir")
    plan = preparing.plan(DATASET.value, SOURCE.value, str(data_dir), SPLITS.value)
    console.print(plan.described, markup=False)
    if plan.is_done:
        console.print(f"prepared already in {plan.directory}: nothing was changed", markup=False)
        return
    directory.make(plan.directory)
    with locked(plan.directory, "preparing"):
        damaged = _write(plan, console)
    if damaged:
        print(*damaged, sep="\n", file=sys.stderr)
        raise UserError(
            f"{len(damaged):,} of {plan.total:,} files cannot be decoded, see above: restore or"
            " remove them, and give the command again"
        )
    console.print(f"prepared in {plan.directory}", markup=False)


def _write(plan: preparing.Plan, console: Console) -> list[str]:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not shows_bars(console))
    row = bar.add_task(plan.name, total=plan.total)
    with (
        bar,
        heartbeat(
            console, lambda: f"{plan.name}: {bar.tasks[0].completed:,.0f} of {plan.total:,} files"
        ),
    ):
        return preparing.write(plan, partial(bar.advance, row))


if __name__ == "__main__":
    cli.run(main, needs=("dataset", "source", "data_dir"))
