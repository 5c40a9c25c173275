"""The README's example runs as it stands."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_notebook_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    distance = jnp.abs(names["adversarial"] - names["images"]).max()
    np.testing.assert_allclose(distance, 0.2, atol=1e-6)
    assert (names["forced"].logits != names["output"].logits).any()
    assert int(names["state"].step) == 1
    assert jnp.isfinite(names["metrics"]["loss"])


def test_named_files_exist():
    root = Path(__file__).parents[1]
    for name in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"configs/\w+\.py", README):
        assert (root / name).exists(), name
