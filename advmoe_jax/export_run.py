"""Writes a run as one small file, which needs no data set to be loaded.

Examples:
    python -m advmoe_jax.export_run --workdir=runs/digits --file=digits.npz

``advmoe_jax.load`` reads it. The weights are rounded to float16, and evaluated once they are.
"""

from absl import flags
from rich.console import Console

from advmoe_jax import cli, storage
from advmoe_jax.errors import UserError
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.evaluating import Asked, named_attacks
from advmoe_jax.runs.exporting import export

WORKDIR = cli.workdir_flag("directory of the run")
FILE = flags.DEFINE_string("file", None, "the .npz file to write", allow_override=True)
ATTACKS = flags.DEFINE_string(
    "attacks", "", "comma-separated, as for evaluate; empty: the config's", allow_override=True
)
EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "number of test images to evaluate on; 0: all", allow_override=True
)
SAMPLE = flags.DEFINE_integer("sample", 100, "number of test images that the file holds")
HALF = flags.DEFINE_bool("half", True, "round the weights to float16")


def main() -> None:
    """Rounds, evaluates, writes, and says what came out."""
    if SAMPLE.value < 1 or EXAMPLES.value < 0:
        raise UserError(
            f"--sample={SAMPLE.value} must be at least 1, --examples={EXAMPLES.value} not negative"
        )
    workdir = directory.located(WORKDIR.value)
    path = directory.located(FILE.value, "file")
    config = directory.read_config(workdir)
    attacks = ATTACKS.value or config.evaluation.attacks
    named_attacks(config, Asked(attacks))  # one that cannot be is told before images are read
    directory.use_compilation_cache(workdir)
    console = Console()
    run = export(
        *(config, workdir, build.load_images(config), path, console),
        attacks=attacks,
        examples=EXAMPLES.value,
        sample=SAMPLE.value,
        half=HALF.value,
    )
    console.print(f"{run}\n{storage.size(path):,} bytes", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    cli.run(main, needs=("workdir", "file"))
