"""A run rounded, evaluated as it is then, and written as one file."""

import jax
import numpy as np
import pytest
from rich.console import Console

from advmoe_jax.files import read_npz
from advmoe_jax.runs import build, importing, load
from advmoe_jax.runs.exporting import export

pytestmark = pytest.mark.slow


def test_the_numbers_are_those_of_what_is_in_the_file(config, tmp_path):
    images = build.load_images(config)
    _, params, stats = build.create_network(config, images)
    importing.write(config, tmp_path / "run", params, stats, 7)
    path = tmp_path / "run.npz"
    how = {"attacks": "fgsm", "examples": 40, "sample": 10}
    export(config, tmp_path / "run", images, path, Console(quiet=True), **how)
    run = load(path)
    kinds = {x.dtype for name, x in read_npz(path).items() if name.startswith("params/")}
    assert kinds == {np.dtype("float16")}
    rounded = jax.tree.map(lambda x: x.astype("float16").astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, run.params, rounded)
    assert len(run.sample.labels) == 10 and run.results["trained"].keys() >= {"git_commit"}
    of_all, of_sample = build.subset(images.test, 40), build.subset(images.test, 10)
    for split, name in ((of_all, "fgsm"), (of_sample, "fgsm@10"), (run.sample, "fgsm@10")):
        found = run.attack("fgsm", *split, progress=False)
        assert found.robust_accuracy == run.results["robust_accuracy"][name]
    assert run.results["attacks"]["fgsm"]["examples"] == 40
