"""The README's example runs as it stands, and what README and docs name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax import config, defaults

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def example():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_the_notebook_example_runs():
    names = {}
    exec(compile(example(), "README.md", "exec"), names)
    distance = jnp.abs(names["adversarial"] - names["images"]).max()
    np.testing.assert_allclose(distance, 0.2, atol=1e-6)
    assert (names["forced"].logits != names["output"].logits).any()
    assert int(names["state"].step) == 1
    assert jnp.isfinite(names["metrics"]["loss"])


def test_the_notebook_example_needs_three_import_lines_of_the_package():
    assert len(re.findall(r"^(?:from|import) advmoe_jax", example(), flags=re.MULTILINE)) <= 3


@each_page
def test_named_files_exist(page):
    text = page.read_text()
    for name in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"(?:configs|docs|benchmarks|launch|advmoe_jax)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name


@each_page
def test_named_modules_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    pattern = r"-m ((?:advmoe_jax|benchmarks|studies)[\w.]*\w)|`(studies\.\w+)`"
    for names in re.findall(pattern, page.read_text()):
        for name in filter(None, names):
            assert importlib.util.find_spec(name), name


@each_page
def test_named_config_values_exist(page):
    of_comparison = [*config.names(config.schema_of(defaults.comparison())), "table"]
    valid = {*config.names(config.any_schema()), *of_comparison}
    for name in re.findall(r"\bconfig\.((?!json\b)[a-z]\w*(?:\.\w+)*)", page.read_text()):
        name = name.removeprefix("run.")
        assert name == "run" or name in valid or any(v.startswith(f"{name}.") for v in valid), name


def test_the_package_is_loaded_room_by_room():
    code = "import sys, advmoe_jax; assert 'jax' not in sys.modules; print(advmoe_jax.models.CNN())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("CNN(name='resnet18_cifar'"), done.stderr
