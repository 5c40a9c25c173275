"""The house keeps its walls: imports point one way, and files and functions stay short.

The order of the rooms, from the bottom up; a room may import those below it, and itself.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "advmoe_jax"
MOST_LINES = {"default": 400, "training/checkpoint.py": 600}
MOST_LINES_OF_A_FUNCTION = 80
# A file at the top level is a room of its own; rooms on one line do not know each other.
ORDER = [
    ["errors", "types", "target"],
    ["storage"],
    ["files", "heartbeat", "hosts", "memory", "parallel", "torch_function", "usage"],
    ["routing", "metrics"],
    ["attacks", "data", "models"],
    ["training", "evaluation", "published"],
    ["defaults", "reports"],
    ["config"],
    ["cli", "runs"],
    [
        "prepare",
        "train",
        "evaluate",
        "explain",
        "compare",
        "cost",
        "import_torch",
        "export_run",
        "export_torch",
        "import_vmoe",
        "leaderboard",
        "completion",
    ],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
NEVER = {  # whatever the order says
    "attacks": {"models", "training", "evaluation", "data"},
    "models": {"attacks", "training", "evaluation", "data"},
    "training": {"evaluation", "reports"},
    "reports": {"training", "models", "runs"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return ".".join(["advmoe_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )


MODULES = {name_of(path): path for path in FILES}


def imported_by(path):
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return {name for name in found if name in MODULES} - {name_of(path)}


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


IMPORTS = {name: imported_by(path) for name, path in MODULES.items()}


def test_every_room_has_its_place():
    assert {room_of(name) for name in MODULES} - {""} == LEVEL.keys()


def test_imports_point_one_way():
    wrong = []
    for name, imports in IMPORTS.items():
        room = room_of(name)
        for other in {room_of(module) for module in imports} - {room, ""}:
            below = room == "" or LEVEL[other] < LEVEL[room]
            if not below or other in NEVER.get(room, ()):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_file_is_in_a_circle():
    done, circles = set(), []

    def visit(name, path):
        if name in path:
            circles.append(path[path.index(name) :])
        elif name not in done:
            for other in sorted(IMPORTS[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in IMPORTS:
        visit(name, [])
    assert circles == []


def lines_of_docstring(function):
    if ast.get_docstring(function) is None:
        return 0
    return function.body[0].end_lineno - function.body[0].lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text, relative = path.read_text(), str(path.relative_to(PACKAGE))
    assert len(text.splitlines()) <= MOST_LINES.get(relative, MOST_LINES["default"])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1 - lines_of_docstring(node)
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


def test_only_runs_and_the_commands_read_a_config():
    readers = {room_of(name) for name, path in MODULES.items() if "ConfigDict" in path.read_text()}
    assert readers <= {"runs", "config", "defaults", "cli", "import_torch"}
