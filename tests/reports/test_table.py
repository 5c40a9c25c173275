"""The terminal table: what it shows, in what width, and what it does without."""

import io
import math

import pytest
from rich.console import Console

from advmoe_jax.reports.table import (
    attack_rows,
    integer,
    load_per_expert,
    number,
    percent,
    print_results,
    radius,
    results_table,
    title,
)


def attack(num_steps, step_size, restarts=1, epsilon=8 / 255):
    return {
        "norm": "linf",
        "epsilon": epsilon,
        "step_size": step_size,
        "num_steps": num_steps,
        "restarts": restarts,
        "examples": 10000,
        "seed": 0,
    }


@pytest.fixture
def moe():
    return {
        "method": "advmoe",
        "model": "resnet18",
        "dataset": "cifar10",
        "seed": 3,
        "standard_accuracy": 0.81234,
        "robust_accuracy": {"pgd20": 0.5121, "autoattack": 0.474, "router": 0.33},
        "attacks": {
            "clean": {"examples": 10000},
            "pgd20": attack(20, 2 / 255),
            "autoattack": {"norm": "linf", "epsilon": 8 / 255, "examples": 10000},
            "router": attack(1000, 0.005, restarts=10, epsilon=0.03),
        },
        "routing": {
            "load": [0.501, 0.4951, 0.0039],
            "entropy": 0.6931,
            "agreement": {"pgd20": 0.975, "router": 0.402},
        },
        "num_params": 11173962,
        "macs_per_image": 556651008,
        "images_per_second": {"clean": 12345.6, "pgd20": 712.1, "router": 1.234},
        "params_sha256": "0123456789abcdef" * 4,
        "device": "1 x NVIDIA H100 80GB HBM3",
        "git_commit": "fa7d04bfa7d04b",
    }


@pytest.fixture
def dense(moe):
    return moe | {"routing": None, "model": "resnet18-dense"}


def printed(results, width=80, **kwargs):
    """What a file receives that standard output was redirected to."""
    out = io.StringIO()
    print_results(results, Console(file=out, width=width), **kwargs)
    return out.getvalue()


def row(text, name):
    return next(" ".join(line.split()) for line in text.splitlines() if line.startswith(name))


def test_one_row_per_attack(moe):
    text = printed(moe)
    assert text.startswith("advmoe, resnet18 on cifar10")
    assert row(text, "clean") == "clean 81.2 12,346"
    assert row(text, "pgd20") == "pgd20 51.2 linf 8/255 20 x 2/255 1 97.5 712"
    assert row(text, "autoattack") == "autoattack 47.4 linf 8/255"
    assert row(text, "router") == "router 33.0 linf 0.03 1000 x 0.005 10 40.2 1.23"


def test_lines_below(moe, tmp_path):
    text = printed(moe, path=tmp_path / "results.json")
    for expected in (
        "0: 50.1%, 1: 49.5%, 2: 0.4% (unused)",
        "0.693 nats",
        "11,173,962",
        "556,651,008",
        "examples         10,000\n",
        "1 x NVIDIA H100 80GB HBM3",
        "0123456789ab\n",
        f"results in {tmp_path / 'results.json'}\n",
    ):
        assert expected in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_fits_80_columns_in_plain_ascii(moe):
    moe["robust_accuracy"]["pgd50"] = 1.0
    moe["attacks"]["pgd50"] = attack(50, 2.5 / 255)
    moe["images_per_second"]["pgd50"] = 123456.0
    lines = printed(moe).splitlines()
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    assert not any(escape in line for line in lines for escape in "\x1b\t")
    # No cell was broken into two lines: header (3), rule, five rows.
    assert len(lines[: lines.index("")]) == 1 + 3 + 1 + 5


def test_the_weights_evaluated_are_named_where_they_are_not_the_last(moe):
    same = moe | {"evaluated": {"params_sha256": moe["params_sha256"]}}
    assert "evaluated sha256" not in printed(same)
    text = printed(moe | {"evaluated": {"params_sha256": "f" * 64}})
    assert "params sha256     0123456789ab" in text
    assert "evaluated sha256  ffffffffffff" in text


def test_path_is_never_broken(moe, tmp_path):
    path = tmp_path / ("long" * 30) / "results.json"
    assert str(path) in printed(moe, width=40, path=path)


def test_dense_has_no_routing(dense):
    text = printed(dense)
    assert "router" not in text.replace("router   ", "")  # the attack, but not the column
    assert "load per expert" not in text
    assert "entropy" not in text
    assert "pgd20" in text


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"standard_accuracy": 0.5},
        {"robust_accuracy": {"pgd20": None}, "attacks": None, "images_per_second": 12.0},
        {"routing": {}, "attacks": {"pgd20": None}, "robust_accuracy": {"pgd20": math.nan}},
        {"routing": {"load": None, "agreement": None, "entropy": None}},
    ],
)
def test_missing_keys_leave_blanks(results):
    assert "clean" in printed(results)
    assert attack_rows(results)[0].attack == "clean"


def test_names_are_not_markup(moe):
    moe["robust_accuracy"] = {"[red]odd": 0.5}
    moe["dataset"] = "[/b]"
    text = printed(moe | {"warnings": ["[bold]flat[/bold] loss"]})
    assert "[red]odd" in text
    assert "on [/b]" in text
    assert "[bold]flat[/bold] loss" in text


def test_differing_numbers_of_examples(moe):
    moe["attacks"]["autoattack"]["examples"] = 1000
    assert "clean 10,000, pgd20 10,000, autoattack 1,000" in printed(moe, width=200)


def test_standard_output_is_the_default(moe, capsys):
    print_results(moe)
    assert "pgd20" in capsys.readouterr().out


def test_table_can_be_printed_on_its_own(moe):
    assert results_table(moe).row_count == 4


def test_title():
    assert title({"method": "trades", "dataset": "digits"}) == "trades on digits"
    assert title({"dataset": "digits"}) == "on digits"
    assert title({}) == "unnamed run"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8 / 255, "8/255"),
        (2.5 / 255, "2.5/255"),
        (0.5 / 255, "0.5/255"),
        (0.0314, "0.0314"),
        (0.2, "0.2"),
        (0.1 + 0.2, "0.3"),
        (1.0, "1"),
        (128 / 255, "128/255"),
        (0.123456, "0.1235"),
        (0, "0"),
        (math.inf, ""),
        (None, ""),
        ("8/255", ""),
    ],
)
def test_radius(value, text):
    assert radius(value) == text


def test_formats():
    assert percent(1) == "100.0"
    assert percent(0.9996) == "100.0"
    assert percent(math.nan) == percent(None) == percent(True) == ""
    assert integer(1234567.8) == "1,234,568"
    assert number(0.69314, " nats") == "0.693 nats"
    assert load_per_expert({"routing": {"load": [1.0, 0.0]}}) == "0: 100.0%, 1: 0.0% (unused)"
