"""The commands under one name: ``advmoe train ...`` is ``python -m advmoe_jax.train ...``.

``python -m advmoe_jax`` without a word lists them.
"""

import ast
import difflib
import os
import runpy
import sys
from pathlib import Path

# In the order in which a person meets them.
COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "explain",
    "compare",
    "leaderboard",
    "cost",
    "export_run",
    "import_torch",
    "import_vmoe",
    "export_torch",
)


def main() -> None:
    """Runs the command that is named first; lists all where none is."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "-help"):
        print(overview())
    elif name == "--completion=bash":
        from advmoe_jax import completion  # which imports every command, and JAX

        print(completion.script(COMMANDS))
    elif name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"advmoe_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    """What is printed where no command is named: all of them, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{_summary(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "Adversarially robust networks that compute only what an input needs.",
            "",
            "Examples:",
            "    advmoe train --config=configs/digits.py --workdir=runs/digits",
            "    advmoe evaluate --workdir=runs/digits --attacks=autoattack",
            "    advmoe train --help",
            "",
            "Commands (advmoe NAME, or python -m advmoe_jax.NAME):",
            *lines,
            "",
            "--completion=bash prints what completes all of this by the tab key, in bash and zsh.",
        ]
    )


def _summary(name: str) -> str:
    """The first line of a command's docstring; nothing is imported for it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # somebody reads the beginning alone: python -m advmoe_jax | head -3
        os._exit(1)
