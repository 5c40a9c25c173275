"""Trains and evaluates every row of a table for several seeds, and writes it.

Examples:
    python -m advmoe_jax.compare --config=configs/compare_digits.py --workdir=runs/paper
    python -m advmoe_jax.compare --config=configs/compare_digits.py --workdir=runs/paper \\
        --config.rows=at_dense,advmoe_assignment --config.run.num_epochs=32

The same command again goes on where it was cut off, and writes the tables of what there is.
--config.run.x.y=... is for the runs of all rows. docs/comparing.md says more.
"""

import sys

from rich.console import Console
from rich.markup import escape

from advmoe_jax import cli
from advmoe_jax.reports import comparison_markdown, write_comparison
from advmoe_jax.runs import directory, rows
from advmoe_jax.runs.comparing import compare
from advmoe_jax.training import loop
from advmoe_jax.types import Tree

cli.config_flag()
WORKDIR = cli.workdir_flag("directory of the comparison; made if missing")


def main() -> None:
    """Runs what is missing; writes tables and report after every seed, and prints the table."""
    config = cli.config_value(rows.check)
    console = Console()
    root = directory.create(WORKDIR.value)
    command = " ".join(["python -m advmoe_jax.compare", *sys.argv[1:]])

    def write(found: Tree) -> None:
        write_comparison(root, {**found, "command": command})

    try:
        found = compare(config, root, console, write)
    except loop.Stopped as stopped:
        cli.stopped(stopped.by, str(stopped), console)
        return
    console.print(f"\n{escape(comparison_markdown(found))}", soft_wrap=True, highlight=False)
    for name in ("table.md", "table.csv", "results.json", "report.html"):
        console.print(f"written: {root / name}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    cli.run(main, needs=("config", "workdir"), schema=rows.schema())
