"""What the pages say can be done: links lead somewhere, commands parse, code runs, names exist."""

import ast
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax import cli, config, defaults
from advmoe_jax.__main__ import COMMANDS
from advmoe_jax.errors import UserError
from advmoe_jax.evaluation.named_attacks import ATTACKS, parse_name
from advmoe_jax.runs import rows

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
ROOMS = sorted({path.stem for path in REFERENCE.glob("*.md")} - {"advmoe_jax"})
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# ------------------------------------------------------------------------------------ links, names


def anchors(page):
    """What a link can name after ``#``: the headings, as GitHub and the site write them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {word.strip().replace(" ", "-") for word in words}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), target


@each_page
def test_named_files_exist(page):
    text = page.read_text()
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
def test_named_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for name in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), flags=re.MULTILINE):
        assert name in targets, name


@each_page
def test_named_config_values_exist(page):
    of_comparison = [*config.names(config.schema_of(defaults.comparison())), "table"]
    valid = {*config.names(config.any_schema()), *of_comparison}
    for name in re.findall(r"\bconfig\.((?!json\b)[a-z]\w*(?:\.\w+)*)", page.read_text()):
        name = name.removeprefix("run.")
        assert name == "run" or name in valid or any(v.startswith(f"{name}.") for v in valid), name


@each_page
def test_extras_exist(page):
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), flags=re.M)
    for name in re.findall(r"pip install -e '\.\[(\w+)\]'", page.read_text()):
        assert name in extras, name


def test_every_page_is_in_the_site_and_the_other_way_round():
    pages = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    tables = {
        name for name in written if name.startswith("compare_") and name.endswith("/table.md")
    }
    assert set(pages) == (written - tables) | {"index.md"} and len(pages) == len(set(pages))


@pytest.mark.parametrize("room", ROOMS)
def test_the_reference_has_what_a_room_lists(room):
    """A function that is named as its file would be taken for the file, and needs a line."""
    text = (REFERENCE / f"{room}.md").read_text()
    assert f"::: advmoe_jax.{room}\n" in text
    module = getattr(advmoe_jax, room)
    for name in module.__all__:
        hidden = (ROOT / "advmoe_jax" / room / f"{name}.py").exists()
        own = getattr(getattr(module, name), "__module__", None)
        if hidden or own == f"advmoe_jax.{room}.{name}":
            assert own is None or f"::: {own}.{name}\n" in text, name


def test_the_reference_has_what_the_package_gives_at_once():
    text = (REFERENCE / "advmoe_jax.md").read_text()
    for name in ("load", "Run", "Attacked", "fit", "model", "from_torch"):
        assert f"::: {getattr(advmoe_jax, name).__module__}.{name}\n" in text, name


def test_every_attack_is_described():
    """By its name, or in the family of ``exit1`` and so on."""
    text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("attacks", "rdi"))
    text += (ROOT / "docs" / "vmoe.md").read_text()
    for name, record in ATTACKS.items():
        if record.side_exit <= 1 and name != "clean":
            assert re.search(rf"`{re.escape(name)}\b", text), name


# --------------------------------------------------------------------------------------- commands


def commands_of(text):
    """(command's name, its words) of every ``python -m advmoe_jax.X ...`` in a text."""
    text = re.sub(r"\\\n\s*", "", text)
    word = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s`#|)"']+)+"""
    for name, rest in re.findall(rf"python -m advmoe_jax\.(\w+)((?: +{word})*)", text):
        yield name, shlex.split(rest)


# A later command takes over a flag that it shares with an earlier one, so each is asked at once.
FLAGS_OF_COMMANDS = """
import importlib, json, sys
from absl import flags
found = {}
for name in sys.argv[1:]:
    module = importlib.import_module(f"advmoe_jax.{name}")
    own = flags.FLAGS.flags_by_module_dict()[module.__name__]
    found[name] = {x.name: getattr(x.parser, "enum_values", x.flag_type()) for x in own}
print(json.dumps(found))
"""


@functools.cache
def flags_of_commands():
    """By command and flag its type, or the list of its choices."""
    arguments = [sys.executable, "-c", FLAGS_OF_COMMANDS, *COMMANDS]
    return json.loads(subprocess.run(arguments, cwd=ROOT, capture_output=True, check=True).stdout)


def check_command(name, words):
    """Asserts that the command would accept these words, as far as words alone can tell."""
    own = flags_of_commands()[name]
    schema = rows.schema() if name == "compare" else config.any_schema()
    file, changes = None, {}
    for word in words:
        if word == "...":
            continue
        if not word.startswith("--"):
            assert name == "leaderboard", word
            continue
        flag, _, value = word.removeprefix("--").partition("=")
        if flag.startswith("config."):
            dotted = flag.removeprefix("config.")
            config.check_name(dotted, schema)
            changes[dotted] = typed(value, config.type_of(dotted, schema))
        elif flag in ("help", "helpfull"):
            continue
        elif flag == "config":
            file = value
        else:
            assert flag in own, word
            assert value or own[flag] == "bool", word
            if isinstance(own[flag], list):
                assert value in own[flag], word
            elif own[flag] in ("int", "float"):
                {"int": int, "float": float}[own[flag]](value)
        if flag == "attacks" and value not in ("...", "list"):
            for attack in value.split(","):
                parse_name(attack)
    if file not in (None, "..."):
        check_config(name, file, changes)


def typed(text, kind):
    """A value of a config as it stands on a command line."""
    if text == "..." or kind is str:
        return text
    if kind is float:
        return cli.number(text)
    value = ast.literal_eval(text)
    assert isinstance(value, kind), (text, kind)
    return value


def check_config(name, file, changes):
    """Asserts that the file gives a valid config, with these changes."""
    path = ROOT / file
    assert path.is_file(), file
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    found = module.get_config()
    assert isinstance(found, ConfigDict)
    changes = {key: value for key, value in changes.items() if value != "..."}
    check = rows.check if name == "compare" else config.check
    check(config.with_changes(found, changes))


@each_page
def test_commands_of_a_page(page):
    for name, words in commands_of(page.read_text()):
        check_command(name, words)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help(name):
    docstring = importlib.import_module(f"advmoe_jax.{name}").__doc__
    found = [(command, words) for command, words in commands_of(docstring) if words]
    assert found and {command for command, _ in found} == {name}
    for command, words in found:
        check_command(command, words)
    for path in re.findall(r"(?:docs|configs)/\w+\.\w+", docstring):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "line",
    [
        "--config=configs/no_such.py",
        "--workdr=x",
        "--config=configs/digits.py --config.model.widht=3",
        "--config=configs/digits.py --config.model.width=2.5",
        "--config=configs/digits.py --config.num_epochs=-1",
        "--config=configs/digits.py --show=3 --process_id",
        "a_word",
    ],
)
def test_a_wrong_command_would_be_seen(line):
    ((name, words),) = commands_of(f"python -m advmoe_jax.train {line}")
    with pytest.raises(Exception, match=r".") as caught:
        check_command(name, words)
    assert issubclass(caught.type, AssertionError | UserError)


def test_commands_are_found_in_every_kind_of_text():
    text = (
        "`python -m advmoe_jax.cost --model=a` or\npython -m advmoe_jax.train --x=1 \\\n  --y  # no"
    )
    assert list(commands_of(text)) == [("cost", ["--model=a"]), ("train", ["--x=1", "--y"])]


# ------------------------------------------------------------------------------------------- code


def example(name):
    """The Python code of a page, which is to have one block of it."""
    page = (ROOT / "docs" / name).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return code


def test_the_functional_example_runs():
    names = {}
    exec(compile(example("functional.md"), "functional.md", "exec"), names)
    distance = jnp.abs(names["adversarial"] - names["images"]).max()
    np.testing.assert_allclose(distance, 0.2, atol=1e-6)
    assert (names["forced"].logits != names["output"].logits).any()
    assert int(names["state"].step) == 1
    assert jnp.isfinite(names["metrics"]["loss"])


def test_the_functional_example_needs_three_import_lines_of_the_package():
    imports = re.findall(
        r"^(?:from|import) advmoe_jax", example("functional.md"), flags=re.MULTILINE
    )
    assert len(imports) <= 3


def test_the_example_of_trained_networks_runs(capsys):
    exec(compile(example("notebooks.md"), "notebooks.md", "exec"), {})
    assert "pgd20 (linf, epsilon 0.2): 100 images, SA " in capsys.readouterr().out


def test_the_example_of_attacks_on_any_function_runs():
    names = {}
    exec(compile(example("attacks.md"), "attacks.md", "exec"), names)
    function, labels = names["function"], names["labels"]

    def loss(images):
        return float(advmoe_jax.attacks.cross_entropy(function(images), labels).sum())

    assert loss(names["images"]) < loss(names["found"]) <= loss(names["again"]) + 1e-4
    assert 0 < names["result"].robust_accuracy < 1


def test_other_pages_have_no_code_that_no_test_runs():
    with_code = {"functional.md", "notebooks.md", "attacks.md"}
    for page in PAGES[1:]:
        assert page.name in with_code or "```python" not in page.read_text(), page
