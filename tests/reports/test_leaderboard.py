"""The leaderboard: what is gathered of runs and comparisons, its CSV, and its page in a browser."""

import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from advmoe_jax.errors import UserError
from advmoe_jax.reports.leaderboard import SCRIPT, leaderboard_csv, write_leaderboard
from advmoe_jax.reports.standings import Attack, collect

PGD = {"norm": "linf", "epsilon": 0.2, "num_steps": 20, "step_size": 0.02, "examples": 360}
EVIL = "<img src=x onerror=\"document.title='hit'\">&'"


def make_run(directory, accuracy=0.7, seed=0, **changes):
    """Writes the results of a made-up run."""
    results = {
        "method": "advmoe",
        "model": "resnet10_cifar",
        "dataset": "digits",
        "seed": seed,
        "standard_accuracy": 0.9,
        "robust_accuracy": {"pgd20": accuracy},
        "attacks": {"clean": {"examples": 360}, "pgd20": PGD},
        "images_per_second": {"clean": 1000.0},
        "cost": {"macs": {"total": 500_000, "router": 40_000}, "params": {"total": 1234}},
        "evaluated": {"checkpoint": "best", "params_sha256": f"{directory.name}{accuracy}"},
        "git_commit": "0123456789abcdef0123",
        "device": "1 x cpu",
        "config": {"seed": seed, "method": "advmoe", "data": {"path": f"{directory}/digits"}},
    }
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results | changes))
    return directory


def make_comparison(directory):
    run = {
        "standard_accuracy": 0.8,
        "robust_accuracy.pgd50": 0.4,
        "robust_accuracy.pgd50@32": 0.6,
        "attacks": {
            "clean": {"examples": 360},
            "pgd50": PGD | {"num_steps": 50},
            "pgd50@32": PGD | {"num_steps": 50, "examples": 32},
        },
        "cost": {"macs": {"total": 1e6, "router": 0}, "params": {"total": 5}},
        "images_per_second": 99.0,
        "model": "vit_tiny_8",
        "dataset": "digits",
        "git_commit": "ab" * 20,
    }
    rows = {
        "dense": {"title": "AT (Dense)", "runs": {"0": run, "1": run}},
        "none": {"title": "None yet", "runs": {}},
    }
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({"rows": rows}))
    return directory


def cells(lines):
    return list(csv.DictReader(io.StringIO(leaderboard_csv(lines))))


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    values = [0.6, 0.7, 0.65]
    runs = [make_run(tmp_path / f"s{i}", value, seed=i) for i, value in enumerate(values)]
    lines, left_out = collect(runs)
    assert len(lines) == 1 and not left_out
    (row,) = cells(lines)
    assert (row["seeds"], row["seed"]) == ("3", "0; 1; 2")
    assert float(row["RA pgd20 linf 0.2"]) == pytest.approx(0.65)
    low, _ = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    half_width = float(row["RA pgd20 linf 0.2.half_width"])
    assert half_width == pytest.approx(np.mean(values) - low)
    assert row["RA pgd20 linf 0.2.images"] == "360" and row["commit"] == "0123456789abcdef0123"
    assert (float(row["macs"]), float(row["images_per_second"])) == (500_000, 1000)


def test_other_configs_and_a_seed_that_is_there_have_lines_of_their_own(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.8)]  # the same seed twice
    runs += [make_run(tmp_path / "c", config={"seed": 1, "method": "at"}, seed=1)]
    lines, _ = collect(runs)
    assert [len(line.entries) for line in lines] == [1, 1, 1]


def test_seeds_of_other_experiments_are_not_averaged(tmp_path):
    def config(seed, data="mnist.tar.gz", **groups):
        path = str(tmp_path / str(seed) / data)
        return {"seed": seed, "method": "at", "data": {"path": path}, **groups}

    one = {"start": {"run": ""}}, {"start": {"run": "runs/standard"}}
    other = {"start": {"run": "elsewhere/standard"}}
    configs = [config(0, **one[0]), config(1, **one[0]), config(2, "cifar.tar.gz", **one[0])]
    configs += [config(3, **one[1]), config(4, **other)]
    runs = [make_run(tmp_path / f"r{c['seed']}", seed=c["seed"], config=c) for c in configs]
    runs.append(make_run(tmp_path / "r5", seed=5, config=config(5, **one[0]), dataset="fashion"))
    lines, _ = collect(runs)
    seeds = [[entry.facts["seed"] for entry in line.entries] for line in lines]
    assert seeds == [["0", "1"], ["2"], ["3", "4"], ["5"]]


def test_a_copy_counts_once(tmp_path):
    same = {"checkpoint": "best", "params_sha256": "ff"}
    runs = [make_run(tmp_path / name, evaluated=same) for name in ("a", "b")]
    lines, left_out = collect(runs)
    assert len(lines) == 1 and len(lines[0].entries) == 1
    assert left_out == [f"{runs[1]} is a copy of {runs[0]} (left out)"]


def test_a_comparison_has_a_line_for_each_row(tmp_path):
    lines, _ = collect([make_comparison(tmp_path / "paper")])
    (line,) = lines
    assert line.entries[0][:2] == ("AT (Dense)", str(tmp_path / "paper"))
    assert cells(lines)[0]["run"] == f"AT (Dense) ({tmp_path / 'paper'})"
    assert [x.facts["seed"] for x in line.entries] == ["0", "1"]
    # Of one attack the result on the most images counts.
    assert line.robust(Attack("pgd50", "linf", 0.2)).mean == pytest.approx(0.4)
    assert line.facts("system") == ["ViT"] and line.mean("images_per_second").mean == 99


def test_other_balls_are_other_columns(tmp_path):
    l2 = PGD | {"norm": "l2", "epsilon": 0.5}
    run = make_run(
        tmp_path / "a",
        robust_accuracy={"pgd20": 0.5, "pgd20@l2-0.5": 0.4},
        attacks={"pgd20": PGD, "pgd20@l2-0.5": l2},
    )
    (row,) = cells(collect([run])[0])
    assert (row["RA pgd20 linf 0.2"], row["RA pgd20 l2 0.5"]) == ("0.5", "0.4")


@pytest.mark.parametrize(
    "changes",
    [
        {"robust_accuracy": {}, "attacks": {}, "config": None},
        {"cost": 3, "config": [], "exits": "x", "evaluated": {}, "git_commit": None},
        {"attacks": {"clean": {"examples": 3}, "pgd20": {"epsilon": {"a": 1}, "norm": []}}},
        {"dataset": {"a": [1]}, "seed": [2], "num_params": "many", "macs_per_image": None},
    ],
)
def test_values_of_other_kinds_are_left_out(tmp_path, changes):
    lines, left_out = collect([make_run(tmp_path / "a", **changes), make_run(tmp_path / "b")])
    assert not left_out and len(cells(lines)) == len(lines)
    write_leaderboard(tmp_path, lines, left_out)


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file.log").write_text("")
    named = sorted(tmp_path.iterdir())
    lines, left_out = collect([*named, make_run(tmp_path / "whole")])
    assert len(lines) == 1 and len(left_out) == 2
    assert "broken/results.json is damaged" in left_out[0] and "empty holds no" in left_out[1]
    with pytest.raises(UserError, match=r"nothing to show: .*empty holds no results"):
        collect([tmp_path / "empty"])
    with pytest.raises(UserError, match="no/such: there is no such directory"):
        collect([tmp_path / "no/such"])


class Tags(HTMLParser):
    """The elements of a page, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [("", {})], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags[-1][0] not in ("script", "style"):
            self.text += data


def test_names_are_escaped_and_nothing_is_loaded(tmp_path):
    attacks = {"robust_accuracy": {EVIL: 0.5}, "attacks": {EVIL: PGD | {EVIL: EVIL}}}
    words = {"method": EVIL, "model": EVIL, "dataset": EVIL, "git_commit": EVIL, "device": EVIL}
    run = make_run(tmp_path / "<u>&", **attacks, **words)
    lines, _ = collect([run])
    html, _ = write_leaderboard(tmp_path, lines, [EVIL])
    page = Tags(html.read_text())
    assert not {"img", "u"} & {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 7 and "<u>&" in page.text
    for tag, attributes in page.tags:
        assert tag != "link" and not {"src", "href", "onerror", "onclick"} & attributes.keys()


def test_no_spreadsheet_takes_a_name_for_a_formula(tmp_path):
    run = make_run(tmp_path / "a", method="=HYPERLINK(0)", model="-1+1", device="@x")
    (row,) = cells(collect([run])[0])
    assert (row["method"], row["model"], row["device"]) == ("'=HYPERLINK(0)", "'-1+1", "'@x")


def test_the_script_is_short():
    assert len(SCRIPT.strip().splitlines()) <= 40


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path, browser):
    accuracies = {"low": 0.2, "high": 0.9, "middle": 0.5}
    for i, (name, accuracy) in enumerate(accuracies.items()):
        cost = {"macs": {"total": 10 ** (6 + i), "router": 1}}
        make_run(tmp_path / name, accuracy, config={"name": name}, cost=cost)
    make_run(tmp_path / "none", robust_accuracy={}, config={}, method=EVIL)
    lines, _ = collect(tmp_path / name for name in (*accuracies, "none"))
    html, _ = write_leaderboard(tmp_path, lines, [])
    browser.open(html.as_uri())

    def order():
        shown = "[...document.querySelector('tbody').rows].filter((row) => !row.hidden)"
        names = browser.value(f"{shown}.map((row) => row.cells[0].dataset.value)")
        return [name.rsplit("/", 1)[-1] for name in names]

    def head(words):
        headers = browser.value("[...document.querySelectorAll('th')].map((x) => x.textContent)")
        return f"th:nth-child({headers.index(words) + 1}) button"

    assert order() == ["low", "high", "middle", "none"]
    robust = head("RA % pgd20 linf 0.2")
    browser.click(robust)  # the best first; without a value last, in both directions
    assert order() == ["high", "middle", "low", "none"]
    browser.click(robust)
    assert order() == ["low", "middle", "high", "none"]
    browser.click(head("MMACs"))  # the cheapest first
    assert order() == ["none", "low", "high", "middle"]
    browser.click(head("run"))
    assert order() == ["high", "low", "middle", "none"]
    assert browser.value("document.querySelectorAll('[aria-sort]').length") == 1
    browser.type("#find", "middle")
    assert order() == ["middle"]

    assert browser.value("document.title") == "Leaderboard"  # EVIL has not run
    assert not browser.of("Runtime.exceptionThrown") and not browser.of("Log.entryAdded")
    assert not browser.of("Runtime.consoleAPICalled")
    asked = [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")]
    assert {re.sub("[?#].*", "", url) for url in asked} == {html.as_uri()}


@pytest.mark.slow
def test_a_browser_runs_no_other_script(tmp_path, browser):
    """The page's policy would stop a script that had come in with a name."""
    lines, _ = collect([make_run(tmp_path / "a")])
    html, _ = write_leaderboard(tmp_path, lines, [])
    attack = "<script>document.title='hit'</script><img src=x onerror=\"document.title='hit'\">"
    html.write_text(html.read_text().replace("</h1>", f"</h1>{attack}"))
    browser.open(html.as_uri())
    assert browser.value("document.title") == "Leaderboard"
    assert len(browser.of("Log.entryAdded")) >= 2  # and it says so
