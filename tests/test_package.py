"""What a notebook sees of the package first: names that are loaded when they are used."""

import subprocess
import sys
from pathlib import Path

import advmoe_jax as am

ROOT = Path(__file__).parents[1]


def in_a_process_of_its_own(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there():
    for name in am.__all__:
        assert getattr(am, name) is not None and name in dir(am)
    assert am.attacks.linf(0.1).epsilon == 0.1  # a room without an import of its own


def test_no_name_is_that_of_a_command():
    """Importing a module would put it in the place of the function."""
    rooms = {path.stem for path in (ROOT / "advmoe_jax").iterdir()}
    assert not rooms & {name for name in am.__all__ if callable(getattr(am, name))}


def test_to_import_it_imports_little():
    """No more than what it is made of: time is a matter of the machine, modules are not."""
    code = (
        "import sys; before = set(sys.modules); import advmoe_jax; print(set(sys.modules) - before)"
    )
    new = {name.strip("' ") for name in in_a_process_of_its_own(code).strip("{}\n").split(",")}
    assert "jax" not in new and "numpy" not in new
    assert {name.split(".")[0] for name in new} <= {"advmoe_jax", "importlib", "typing"} | (
        sys.stdlib_module_names
    )


def test_to_load_every_room_touches_no_device():
    code = (
        "import advmoe_jax as am; [getattr(am, name) for name in am.__all__]; "
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert in_a_process_of_its_own(code) == "False\n"
