"""Evaluates a trained run under attacks.

Examples:
    python -m advmoe_jax.evaluate --workdir=runs/digits --attacks=autoattack,moe
    python -m advmoe_jax.evaluate --workdir=runs/digits --attacks=pgd50 --examples=99
    python -m advmoe_jax.evaluate --attacks=list

Results of earlier evaluations are kept. docs/attacks.md says more of the attacks.
"""

import jax
from absl import flags
from rich.console import Console

from advmoe_jax import cli, hosts
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.wanted import applicable
from advmoe_jax.reports import print_attacks, print_results, write_report
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.evaluating import Asked, evaluate, named_attacks
from advmoe_jax.runs.leaving import SPLITS, check_rule
from advmoe_jax.training import loop

WORKDIR = cli.workdir_flag("directory of the run")
ATTACKS = flags.DEFINE_string(
    "attacks", "", "comma-separated names; list: which there are; empty: the config's"
)
EXAMPLES = flags.DEFINE_integer("examples", 0, "number of test images; 0: all", allow_override=True)
NORM = flags.DEFINE_string("norm", "", "linf, l2 or l1; empty: the config's")
EPSILON = flags.DEFINE_string("epsilon", "", "radius, such as 8/255 or 0.031; empty: the config's")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "images attacked at once; 0: the config's", allow_override=True
)
SAVE_EXAMPLES = flags.DEFINE_bool(
    "save_examples", False, "write the adversarial images to examples/<attack>.npz"
)
THRESHOLDS = flags.DEFINE_string(
    "thresholds", "", "when images leave a multi-exit network, see docs/rdi.md; empty: the config's"
)
THRESHOLDS_FROM = flags.DEFINE_enum(
    "thresholds_from", "validation", SPLITS, "images to choose them on; test: to compare alone"
)
CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "best", ["best", "last"], "which to evaluate", allow_override=True
)
OUT = flags.DEFINE_string(
    "out", "", "directory to write to instead of the run's, which then may be read-only"
)
INDIVIDUAL = flags.DEFINE_bool(
    "individual", False, "every attack of AutoAttack on all images, for its own robust accuracy"
)

join_hosts = cli.host_flags()


def main() -> None:
    """Evaluates, prints a table, updates ``results.json`` and the report."""
    if ATTACKS.value == "list":
        print_attacks(Console())
        return
    cli.require("workdir")
    for flag in (EXAMPLES, BATCH_SIZE):
        if flag.value < 0:
            raise UserError(f"--{flag.name}={flag.value} must not be negative")
    join_hosts()
    workdir = directory.located(WORKDIR.value)
    config = directory.read_config(workdir)
    check_rule(config, THRESHOLDS.value)
    out = directory.create_beside(OUT.value) if OUT.value else workdir
    directory.use_compilation_cache(out)
    console = Console(quiet=jax.process_index() > 0)
    own = applicable(config.evaluation.attacks, build.architecture(config).parts)
    asked = Asked(
        attacks=ATTACKS.value or own,
        examples=EXAMPLES.value,
        batch_size=BATCH_SIZE.value,
        norm=NORM.value,
        epsilon=EPSILON.value,
        which=CHECKPOINT.value,
        save_examples=SAVE_EXAMPLES.value,
        individual=INDIVIDUAL.value,
        thresholds=THRESHOLDS.value,
        thresholds_from=THRESHOLDS_FROM.value,
    )
    named_attacks(config, asked)  # an attack that cannot be is told before images are read
    try:
        results = evaluate(config, workdir, build.load_images(config), asked, console, out)
    except loop.Stopped as stopped:
        cli.stopped(stopped.by, str(stopped), console)
        hosts.leave()
        return
    if jax.process_index() == 0:
        report = write_report(workdir, out)
        print_results(results, console, out / "results.json")
        console.print(f"report in {report}", soft_wrap=True)
    hosts.leave()


if __name__ == "__main__":
    cli.run(main)
