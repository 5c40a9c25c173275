"""Gathers the results of many runs into one sortable page and a CSV.

Examples:
    python -m advmoe_jax.leaderboard runs/*
    python -m advmoe_jax.leaderboard runs/digits runs/paper --out=shared

Runs that differ in their seed alone are one line, with the mean and its 95% interval; a comparison
has a line for each of its rows. The page needs no other file, and nothing is read but results.json
of each directory.
"""

from absl import flags
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.reports import collect, write_leaderboard
from advmoe_jax.runs import directory

OUT = flags.DEFINE_string(
    "out", ".", "directory for leaderboard.html and leaderboard.csv", allow_override=True
)


def main(directories: list[str]) -> None:
    """Writes the page and the CSV, and says what was left out."""
    out = directory.located(OUT.value, "out")
    lines, left_out = collect(directory.located(name) for name in directories)
    page, table = write_leaderboard(out, lines, left_out)
    console = Console(highlight=False, soft_wrap=True)
    for sentence in left_out:
        console.print(f"note: {sentence}", markup=False)
    seeds = sum(len(line.entries) for line in lines)
    lines_of = f"{len(lines)} line{'s' * (len(lines) > 1)} of {seeds} run{'s' * (seeds > 1)}"
    console.print(f"{lines_of}: {page}, {table}", markup=False)


if __name__ == "__main__":
    cli.run(main, takes="directories")
