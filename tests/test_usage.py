"""What ``--help`` prints of a docstring and of flags of every kind."""

from absl import flags

from advmoe_jax.usage import WIDTH, usage

DOCSTRING = """Does one thing.

Examples:
    python -m something --a=1 \\
        --b=2

A long paragraph with ``code`` in it, which is filled up to the width that a terminal has at the
very least.
"""


def made():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_integer("examples", 0, "number of images; 0: all", flag_values=values)
    flags.DEFINE_integer("top_k", 2, "experts", flag_values=values)
    flags.DEFINE_float("ratio", 1.0, "width", flag_values=values)
    flags.DEFINE_enum("which", "best", ["best", "last"], "checkpoint", flag_values=values)
    flags.DEFINE_bool("show", False, "print", flag_values=values)
    flags.DEFINE_bool("half", True, "round", flag_values=values)
    flags.DEFINE_string("a_flag_of_a_very_long_name", "x", "word " * 30, flag_values=values)
    return [values[name] for name in values]


def test_flags_of_every_kind_in_their_order():
    order = ["workdir", "examples", "top_k", "ratio", "which", "show", "half"]
    flags_of = {flag.name: flag for flag in made()}
    text = usage(DOCSTRING, [flags_of[name] for name in order])
    shown = [line for line in text.splitlines() if line.startswith("  --")]
    assert [line.split(maxsplit=1) for line in shown] == [
        ["--workdir=...", "directory of the run"],
        ["--examples=N", "number of images; 0: all"],
        ["--top_k=N", "experts (default: 2)"],
        ["--ratio=X", "width (default: 1.0)"],
        ["--which=best|last", "checkpoint (default: best)"],
        ["--show", "print"],
        ["--[no]half", "round"],
    ]


def test_paragraphs_are_filled_and_examples_are_left_alone():
    text = usage(DOCSTRING, made())
    assert text.startswith(
        "Does one thing.\n\nExamples:\n    python -m something --a=1 \\\n        --b"
    )
    assert "A long paragraph with code in it, which is filled" in text and "``" not in text
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\n  --a_flag_of_a_very_long_name=...\n      " in text
