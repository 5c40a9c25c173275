"""The report: numbers, curves, safety of the HTML, and runs that lack this or that."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from advmoe_jax.errors import UserError
from advmoe_jax.reports import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(workdir, moe=True, epochs=3, validate_every=1, **overrides):
    """Writes the three files of a made-up run."""

    def routing(load):
        return {"load": load, "entropy": 0.6, "agreement": 0.9} if moe else None

    def epoch(number):
        validated = number % validate_every == 0
        validation = {"standard_accuracy": 0.6, "robust_accuracy": 0.4}
        return {
            "epoch": number,
            "step": 351 * number,
            "seconds": 12.3,
            "images_per_second": 900.1,
            "train": {
                "loss": 1.2 / number,
                **({"router_loss": 0.9} if moe else {}),
                "standard_accuracy": 0.61,
                "robust_accuracy": 0.3,
                "routing": routing([0.7, 0.295, 0.005]),
            },
            "validation": validation | {"routing": routing([0.5, 0.3, 0.2])} if validated else None,
        }

    results = {
        "method": "advmoe" if moe else "at",
        "model": "resnet18",
        "dataset": "digits",
        "seed": 3,
        "steps": 1053,
        "standard_accuracy": 0.9722,
        "robust_accuracy": {"fgsm": 0.8, "pgd20": 0.6128},
        "attacks": {
            name: {
                "norm": "linf",
                "epsilon": 0.2,
                "step_size": 0.02,
                "num_steps": steps,
                "restarts": 1,
                "examples": 360,
                "seed": 7,
            }
            for name, steps in (("fgsm", 1), ("pgd20", 20))
        },
        "routing": {"load": [0.5, 0.3, 0.2], "entropy": 0.5, "agreement": {"pgd20": 0.971}}
        if moe
        else None,
        "num_params": 1234567,
        "macs_per_image": 7654321,
        "images_per_second": {"clean": 5000.0, "pgd20": 123.4},
        "params_sha256": "ab" * 32,
        "device": "1 x TFRT_CPU",
        "versions": {"jax": "0.10.2"},
        "git_commit": "0123456789abcdef",
    }
    workdir.mkdir(exist_ok=True)
    (workdir / "results.json").write_text(json.dumps(results | overrides))
    (workdir / "config.json").write_text(json.dumps({"model": {"num_experts": 3 if moe else 1}}))
    lines = [json.dumps(epoch(number)) for number in range(1, epochs + 1)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return workdir


class Page(HTMLParser):
    """Collects a page's tags, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.extend(attrs)

    def handle_data(self, data):
        self.text += data


def test_numbers_appear_with_their_conditions(tmp_path):
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert "advmoe, resnet18 on digits" in page.text
    for expected in (
        "97.2%",
        "Robust accuracy (RA), lowest of 2 attacks",
        "61.3%",
        "pgd20, linf, epsilon 0.2, 20 steps of 0.02, 1 restart(s), 360 images, attack seed 7, "
        "training seed 3, 1 x TFRT_CPU, commit 0123456789ab",
        "20 × 0.02",
        "80.0",
        "97.1",
        "1,234,567",
        "7,654,321",
        "0: 50.0%, 1: 30.0%, 2: 20.0%",
        "ab" * 32,
        "jax 0.10.2",
        '"num_experts": 3',
        "3 epochs, 37 s, median 900 images/s.",
    ):
        assert expected in page.text, expected


def test_the_headline_is_of_the_run_s_threat_model_and_of_the_network_itself(tmp_path):
    make_run(tmp_path, epochs=0)
    results = json.loads((tmp_path / "results.json").read_text())
    accuracies = {"moe": 0.1, "moe_network": 0.5, "worst_pathway": 0.2, "pgd20@l2-3": 0.0}
    results["robust_accuracy"] |= accuracies
    judges = {"moe": "the network, then each pathway held fixed", "moe_network": "the network"}
    judges["worst_pathway"] = "the pathway held fixed"
    results["attacks"] |= {name: {"judge": judge} for name, judge in judges.items()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(write_report(tmp_path))
    assert "Robust accuracy (RA), lowest of 3 attacks50.0%moe_network" in page.text


def test_page_is_self_contained(tmp_path):
    page = Page(write_report(make_run(tmp_path)))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 1
    assert "url(" not in page.source
    assert "@import" not in page.source
    embedded = base64.b64decode(sources[0].removeprefix("data:image/png;base64,"))
    assert embedded == (tmp_path / "curves.png").read_bytes()
    assert embedded.startswith(PNG)


def test_every_open_tag_is_closed(tmp_path):
    page = Page(write_report(make_run(tmp_path, moe=False, warnings=["odd"])))
    for tag in set(page.tags) - {"meta", "img"}:
        assert page.tags.count(tag) == len(re.findall(f"</{tag}>", page.source)), tag


def test_hostile_strings_are_escaped(tmp_path):
    hostile = "</pre><script>alert('&\"')</script>"
    make_run(
        tmp_path,
        epochs=0,
        method=hostile,
        device=hostile,
        git_commit=hostile,
        warnings=[hostile],
        versions={hostile: hostile},
        robust_accuracy={hostile: 0.5},
        attacks={hostile: {"norm": hostile, "seed": hostile}},
    )
    (tmp_path / "config.json").write_text(json.dumps({hostile: hostile}))
    page = Page(write_report(tmp_path))
    assert "script" not in page.tags
    assert page.tags.count("pre") == 1
    assert page.text.count(hostile) >= 8


def test_dense_has_no_routing(tmp_path):
    page = Page(write_report(make_run(tmp_path, moe=False, epochs=0)))
    assert "router agreement" not in page.text
    assert "per expert" not in page.text
    assert "Routing entropy" not in page.text


def test_torn_metrics_are_said(tmp_path):
    make_run(tmp_path, epochs=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"note": "no epoch"}\n[]\n\n{"epoch": 3, "tra')
    page = Page(write_report(tmp_path))
    assert "1 line(s) of metrics.jsonl cannot be read" in page.text
    assert "2 epochs" in page.text


@pytest.mark.parametrize(
    "results",
    [
        {},
        {"robust_accuracy": None, "attacks": None, "routing": None, "warnings": None},
        {"standard_accuracy": None, "robust_accuracy": {"pgd20": None}},
        {"robust_accuracy": {"pgd20": 0.5}, "routing": {"load": None}},
    ],
)
def test_missing_keys(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = Page(write_report(tmp_path))
    assert "not recorded" in page.text
    assert "No curves" in page.text
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("content", ["", '{"method": ', "[1, 2]", "\udcff"])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"results\.json") as error:
        write_report(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_results_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"results\.json does not exist.*advmoe_jax\.evaluate"):
        write_report(tmp_path)


def test_damaged_config_is_a_warning(tmp_path):
    make_run(tmp_path, epochs=0, config={"from": "results"})
    (tmp_path / "config.json").write_text("{")
    page = Page(write_report(tmp_path))
    assert "config.json cannot be read" in page.text
    assert '"from": "results"' in page.text


def test_warnings_come_first(tmp_path):
    page = Page(write_report(make_run(tmp_path, epochs=0, warnings=["pgd50 is weaker than pgd20"])))
    assert page.text.index("pgd50 is weaker than pgd20") < page.text.index("Standard accuracy")


def test_matplotlib_is_imported_only_to_draw_and_without_pyplot(tmp_path):
    make_run(tmp_path)
    code = f"""
import sys, pathlib
from advmoe_jax.reports import write_report
assert "matplotlib" not in sys.modules
write_report(pathlib.Path({str(tmp_path)!r}))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
