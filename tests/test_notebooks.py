"""The notebooks run from a clean kernel, carry no outputs, and import nothing deep."""

import ast
import base64
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "01_attack_any_function",
    "02_train_advmoe",
    "03_routes_under_attack",
    "04_multi_exit",
    "05_vmoe_tokens",
    "06_sweep_with_configs",
]
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path):
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_all_of_them_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@each
def test_outputs_are_stripped(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert path.stat().st_size < 20_000


@each
def test_the_first_cell_says_what_colab_needs(path):
    assert code_of(path)[0].startswith("# Colab: ") and "%pip install" in code_of(path)[0]


@each
def test_imports_are_not_deep(path):
    """``advmoe_jax`` itself, or a room of it: what is behind a room's door is no example."""
    for node in ast.walk(ast.parse("\n".join(code_of(path)))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert not module.startswith("advmoe_jax.") or module.count(".") == 1, module


@pytest.mark.slow
@each
def test_it_runs_from_a_clean_kernel(path, monkeypatch):
    # As its readers have it: one device, and programs that run as fast as they can.
    monkeypatch.setenv("XLA_FLAGS", "")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    settings = {"timeout": 900, "kernel_name": "python3"}
    where = {"metadata": {"path": str(FOLDER.parent)}}
    nbclient.NotebookClient(notebook, resources=where, **settings).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    errors = [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    assert not [text for text in errors if "warn" in text.lower()]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert pictures and all(len(base64.b64decode(p)) > 5_000 for p in pictures)
