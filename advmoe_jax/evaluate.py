"""Evaluates a trained run: ``python -m advmoe_jax.evaluate --workdir=... --attacks=...``."""

from pathlib import Path

from absl import flags
from rich.console import Console

from advmoe_jax import cli, experiment
from advmoe_jax import config as config_lib
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.report import write_report
from advmoe_jax.evaluation.table import print_results

WORKDIR = cli.workdir_flag("directory of the run")
ATTACKS = flags.DEFINE_string(
    "attacks", "", "such as clean,fgsm,pgd20,pgd50,router,router_kl; empty: the config's"
)
EXAMPLES = flags.DEFINE_integer("examples", 0, "number of test images; 0: all", allow_override=True)
CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "best", ["best", "last"], "which to evaluate", allow_override=True
)


def main() -> None:
    """Evaluates, prints a table, updates ``results.json`` and the report."""
    if EXAMPLES.value < 0:
        raise UserError(f"--examples={EXAMPLES.value} must not be negative")
    workdir = Path(WORKDIR.value).expanduser()
    config = config_lib.load(workdir / "config.json")
    experiment.use_compilation_cache(workdir)
    console = Console()
    results = experiment.evaluate(
        config,
        workdir,
        experiment.load_images(config),
        attacks=ATTACKS.value or config.evaluation.attacks,
        examples=EXAMPLES.value,
        which=CHECKPOINT.value,
        console=console,
    )
    report = write_report(workdir)
    print_results(results, console, workdir / "results.json")
    console.print(f"report in {report}", soft_wrap=True)


if __name__ == "__main__":
    cli.run(main, needs=("workdir",))
