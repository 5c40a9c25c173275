"""Explains a trained run by its routes, clean and attacked.

Examples:
    python -m advmoe_jax.explain --workdir=runs/digits
    python -m advmoe_jax.explain --workdir=runs/digits --attack=ste_pgd20

What it finds is in explanation.json and in the run's report.html.
"""

from absl import flags
from rich.console import Console

from advmoe_jax import cli
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.explanation import FILE
from advmoe_jax.heartbeat import heartbeat
from advmoe_jax.reports import print_explanation, write_report
from advmoe_jax.runs import build, directory, explaining

WORKDIR = cli.workdir_flag("directory of the run")
ATTACK = flags.DEFINE_string("attack", "pgd20", "that is explained, such as pgd20 or ste_pgd20")
EXAMPLES = flags.DEFINE_integer("examples", 0, "number of test images; 0: all", allow_override=True)
CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "best", ["best", "last"], "which to explain", allow_override=True
)


def main() -> None:
    """Explains, prints the gist, writes ``explanation.json``, figures and the report."""
    if EXAMPLES.value < 0:
        raise UserError(f"--examples={EXAMPLES.value} must not be negative")
    workdir = directory.located(WORKDIR.value)
    config = directory.read_config(workdir)
    directory.use_compilation_cache(workdir)
    console = Console()
    with heartbeat(console, lambda: f"{ATTACK.value}: the explanation is under way"):
        found = explaining.explain(
            config,
            workdir,
            build.load_images(config),
            attack=ATTACK.value,
            examples=EXAMPLES.value,
            which=CHECKPOINT.value,
        )
    print_explanation(found, console)
    console.print(f"explanation in {workdir / FILE}", soft_wrap=True)
    if (workdir / "results.json").exists():
        console.print(f"report in {write_report(workdir)}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, needs=("workdir",))
