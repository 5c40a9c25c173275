"""What JPEG files cost a network's accuracy: ``python -m studies.jpeg --workdir=...``.

An archive of JPEG files is not the data set that published numbers are of. How far it is off cannot
be measured without the originals; but what one more compression does can. The test images are
shifted against JPEG's grid of blocks, compressed as files usually are (quality 75, colours at half
the resolution), decoded and shifted back, once and twice, and evaluated each time.

Judges nothing: it prints what to expect of data compressed once. Nothing is written to the
run's directory.
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from advmoe_jax import cli
from advmoe_jax.runs import build, directory
from advmoe_jax.runs.evaluating import Asked, evaluate

WORKDIR = cli.workdir_flag("directory of a trained run on colour images")
ATTACKS = flags.DEFINE_string("attacks", "clean,pgd20", "as in evaluate", allow_override=True)
EXAMPLES = flags.DEFINE_integer("examples", 300, "number of test images", allow_override=True)
THRESHOLDS = flags.DEFINE_string("thresholds", "", "as in evaluate", allow_override=True)
QUALITY = flags.DEFINE_integer("quality", 75, "of JPEG", 1, 95, allow_override=True)
_MARGIN = 8  # one block of JPEG
_SHIFTS = ((3, 5), (6, 2))  # down and right, in pixels


def main() -> None:
    """Evaluates the run on its test images, compressed not at all, once more, and twice more."""
    workdir = directory.located(WORKDIR.value)
    config = directory.read_config(workdir)
    images = build.load_images(config)
    test = build.subset(images.test, EXAMPLES.value)
    asked = Asked(ATTACKS.value, thresholds=THRESHOLDS.value)
    compressed = test.images
    title = f"{len(test.labels)} test images, JPEG at quality {QUALITY.value}"
    table = Table("further compressions", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("pixels moved by, of 255", justify="right")
    for times, shift in enumerate(((0, 0), *_SHIFTS)):
        if times:
            compressed = np.stack([once_more(x, QUALITY.value, shift) for x in compressed])
        changed = images._replace(test=test._replace(images=compressed))
        with TemporaryDirectory() as out:
            found = evaluate(config, workdir, changed, asked, Console(), Path(out))
        accuracies = {"clean": found["standard_accuracy"], **found["robust_accuracy"]}
        if not times:
            for name in accuracies:
                table.add_column(f"{name} %", justify="right")
        moved = np.abs(compressed.astype(int) - test.images).mean()
        cells = [f"{100 * accuracy:.1f}" for accuracy in accuracies.values()]
        table.add_row(str(times), f"{moved:.1f}", *cells)
    Console().print(table, highlight=False)


def once_more(
    image: UInt8[np.ndarray, "height width 3"], quality: int, shift: tuple[int, int]
) -> UInt8[np.ndarray, "height width 3"]:
    """The image as a JPEG file gives it back whose blocks begin ``shift`` pixels elsewhere."""
    height, width, _ = image.shape
    down, right = shift
    wide = np.pad(image, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), mode="reflect")
    file = io.BytesIO()
    Image.fromarray(wide[down:, right:]).save(file, "jpeg", quality=quality, subsampling="4:2:0")
    back = np.asarray(Image.open(file))
    top, left = _MARGIN - down, _MARGIN - right
    return back[top : top + height, left : left + width]


if __name__ == "__main__":
    cli.run(main, needs=("workdir",))
