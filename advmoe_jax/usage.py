"""What ``--help`` of a command prints: what it does, examples, its flags, on one screen.

The words are the module's docstring, and the flags stand in the order in which it defines them.
"""

import textwrap
from collections.abc import Sequence

from absl import flags

WIDTH = 80
# Where the flags' texts begin; a longer flag has a line of its own.
_TEXT_AT = 26
_VALUES = {"int": "=N", "float": "=X", "bool": ""}


def usage(docstring: str, own: Sequence[flags.Flag]) -> str:
    """The text for a person who asks what a command does.

    Args:
        docstring: of the command's module: a sentence, examples, what else is to be known.
        own: the command's flags.
    """
    paragraphs = docstring.strip().replace("``", "").split("\n\n")
    words = "\n\n".join(x if "\n    " in x else textwrap.fill(x, WIDTH) for x in paragraphs)
    lines = [line for flag in own for line in _described(flag)]
    return "\n".join([words, "", "Flags:", *lines, "", "--helpfull lists the libraries' flags."])


def _described(flag: flags.Flag) -> list[str]:
    kind = flag.flag_type()
    values = (
        "=" + "|".join(flag.parser.enum_values) if "enum" in kind else _VALUES.get(kind, "=...")
    )
    turned_off = "[no]" if flag.default is True else ""  # what is on can only be turned off
    name = f"  --{turned_off}{flag.name}{values}"
    words = flag.help.removeprefix(f"<{values[1:]}>: ")  # where absl repeats them
    text = textwrap.wrap(f"{words}{_default(flag)}", WIDTH - _TEXT_AT)
    first = [name] if len(name) + 2 > _TEXT_AT else []
    lines = [" " * _TEXT_AT + line for line in text]
    if not first:
        lines[0] = name.ljust(_TEXT_AT) + text[0]
    return first + lines


def _default(flag: flags.Flag) -> str:
    """The default, where it says something that the flag's own words do not."""
    if flag.default in (None, "", 0) or isinstance(flag.default, bool) or flag.name == "config":
        return ""
    return f" (default: {flag.default})"
