"""Tables and page of a comparison with known numbers."""

import csv
import io
import json

import pytest

from advmoe_jax.evaluation.statistics import estimate, paired_difference
from advmoe_jax.reports import comparison_markdown, write_comparison
from advmoe_jax.reports.comparison_figures import left_end, row_styles, side_by_side
from advmoe_jax.reports.comparison_tables import (
    comparison_csv,
    complaints,
    main_table,
    notes,
    verdicts,
)

COLUMNS = {
    "standard_accuracy": "SA %",
    "robust_accuracy.pgd50": "RA (PGD-50) %",
    "robust_accuracy.moe": "RA (MoE suite) %",
    "agreement": "router agreement (PGD-50) %",
    "images_per_second": "images/s",
}
DENSE = {0: (0.80, 0.50), 1: (0.82, 0.48), 2: (0.84, 0.52)}
ADVMOE = {0: (0.81, 0.53), 1: (0.83, 0.50), 2: (0.82, 0.56)}


def numbers(accuracies, is_moe):
    standard, robust = accuracies
    macs = {"total": 500_000, "router": 200_000, "pathway": 300_000, "dense": 1_000_000}
    if not is_moe:
        macs |= {"total": 1_000_000, "router": 0, "pathway": 1_000_000}
    run = {
        "standard_accuracy": standard,
        "robust_accuracy.pgd50": robust,
        "agreement": 0.9 if is_moe else None,
        "images_per_second": 1234.5,
        "cost": {"macs": macs, "params": {"total": 171_780}},
        "attacks": {
            "clean": {"examples": 360},
            "pgd50": {"norm": "linf", "epsilon": 8 / 255, "num_steps": 50, "step_size": 2 / 255,
                      "examples": 360},
        },
        "curve": {"epsilon": [0, 0.1], "accuracy": [standard, robust],
                  "attack": {"norm": "linf", "num_steps": 20}},
        "routing": {"load_per_class": [[0.5, 0.5], None]} if is_moe else None,
        "class_names": ["cat", "dog"],
        "dataset": "digits", "model": "resnet4", "warnings": [], "device": "1 x cpu",
        "git_commit": "0123abc",
    }  # fmt: skip
    return run | ({"robust_accuracy.moe": robust - 0.1} if is_moe else {})


def gathered(seeds=(0, 1, 2), failed=()):
    """As ``comparison.gather`` writes it."""
    rows = {}
    for name, title, of_seed in (
        ("at_dense", "AT (Dense)", DENSE),
        ("advmoe_pathway", "AdvMoE, pathway", ADVMOE),
    ):
        runs = {s: numbers(of_seed[s], "moe" in name) for s in seeds if (name, s) not in failed}
        row = {"title": title, "about": "about it", "runs": {str(s): r for s, r in runs.items()}}
        row["style"], row["judged"] = {}, name.startswith("advmoe")
        row["failed"] = {str(s): "it diverged" for n, s in failed if n == name}
        row["estimates"], row["differences"] = {}, {}
        for column in COLUMNS:
            values = {s: r[column] for s, r in runs.items() if r.get(column) is not None}
            found = estimate(list(values.values()))
            row["estimates"][column] = found and found._asdict()
            if "accuracy" in column:
                index = ("standard_accuracy", "robust_accuracy.pgd50").index(column) if (
                    "moe" not in column) else None  # fmt: skip
                dense = {} if index is None else {s: DENSE[s][index] for s in seeds}
                found = paired_difference(values, dense)
                row["differences"][column] = found and found._asdict()
        row["cost"] = next((r["cost"] for r in runs.values()), None)
        rows[name] = row
    return {
        "columns": COLUMNS,
        "reference": "at_dense",
        "level": 0.95,
        "throughput": {"batch_size": 120, "device": "1 x cpu"},
        "seeds": list(seeds) or [0],
        "rows": rows,
        "versions": {"jax": "1"},
        "config": {"run": {"attack": {"epsilon": 8 / 255}}},
    }


def test_the_tables_hold_means_intervals_and_paired_differences():
    text = comparison_markdown(gathered())
    # SA of dense: mean 82, t(0.975, 2) = 4.303 times 2 / sqrt(3) = 4.97.
    assert "| AT (Dense) | 82.0 ± 5.0 | 50.0 ± 5.0 | – | – |" in text
    assert "| 1.00 M | 171,780 | 3 |" in text
    # Differences of SA: 1, 1, -2 points: mean 0, 4.303 * sqrt(3) / sqrt(3) = 4.30; of RA: 3, 2, 4
    # points: mean 3, 4.303 / sqrt(3) = 2.48.
    assert "| AdvMoE, pathway | +0.0 ± 4.3 | +3.0 ± 2.5 |" in text
    assert "90.0 ± 0.0" in text and "0.500 M (0.200 M + 0.300 M)" in text
    assert "RA (PGD-50): linf, epsilon 8/255, 50 steps, step size 2/255, 360 test images" in text
    assert "batches of 120, all runs in turn in one process, on 1 x cpu" in text


def test_a_comparisons_remark_stands_first_and_withheld_images_are_named():
    found = gathered()
    found["config"] |= {"remark": "**it decides nothing**"}
    found["config"]["run"]["data"] = {"test_split": "withheld"}
    assert notes(found)[0] == "**it decides nothing**"
    assert "360 withheld images" in comparison_markdown(found)
    assert "test images" not in comparison_markdown(found)


def test_what_is_no_share_is_shown_in_its_own_unit():
    found = gathered()
    found["columns"] = {
        "images_per_second": "images/s",
        "mean_macs.clean": "mean MACs (clean), millions",
        "slope": "slope at the images, median",
    }
    for row in found["rows"].values():
        row["estimates"] = {
            "standard_accuracy": row["estimates"]["standard_accuracy"],
            "images_per_second": estimate([1234.5, 1234.5])._asdict(),
            "mean_macs.clean": estimate([0.125, 0.125])._asdict(),
            "slope": estimate([13.256])._asdict(),
        }
    _, (first, _) = main_table(found)
    assert first[1:4] == ["1,234 ± 0", "0.12 ± 0.00", "13.26"]


def test_the_verdict_says_what_the_interval_allows():
    (line,) = verdicts(gathered())
    assert "at 0.50 of its MACs" in line
    assert "SA +0.0 ± 4.3 points (no difference shown: the interval holds 0)" in line
    assert "RA (PGD-50) +3.0 ± 2.5 points (above it)" in line
    (line,) = verdicts(gathered(seeds=(0,)))
    assert "RA (PGD-50) +3.0 points (one seed, so no interval: this may be chance)" in line


def test_one_seed_has_no_interval_and_says_so():
    found = gathered(seeds=(0,))
    text = comparison_markdown(found)
    assert "| AT (Dense) | 80.0 | 50.0 |" in text and "±" not in text
    assert "where there is one seed there is no interval" in notes(found)


def test_what_is_missing_is_said():
    found = gathered(failed=[("advmoe_pathway", 1)])
    assert complaints(found) == ["AdvMoE, pathway, seed 1, is not in the table: it diverged"]
    # Seeds 0 and 2 are left: 1 and -2 points, 12.706 * 1.5 = 19.06.
    assert "| AdvMoE, pathway | -0.5 ± 19.1 |" in comparison_markdown(found)
    found = gathered()
    found["rows"]["at_dense"]["runs"].pop("2")
    assert complaints(found) == ["AT (Dense), not finished yet: seed 2"]
    for run in found["rows"]["at_dense"]["runs"].values():
        run["warnings"] = ["it is odd"]
    assert complaints(found)[1:] == ["AT (Dense), seed 0, 1: it is odd"]
    assert "no run is finished yet" in comparison_markdown(gathered(seeds=()))


def test_the_csv_is_for_programs():
    rows = list(csv.DictReader(io.StringIO(comparison_csv(gathered()))))
    assert [row["row"] for row in rows] == ["at_dense", "advmoe_pathway"]
    assert float(rows[1]["robust_accuracy.pgd50.mean"]) == pytest.approx(0.53)
    assert float(rows[1]["robust_accuracy.pgd50.difference"]) == pytest.approx(0.03)
    assert float(rows[1]["robust_accuracy.pgd50.difference_half_width"]) == pytest.approx(
        0.0248, abs=1e-4
    )
    assert rows[0]["robust_accuracy.moe.mean"] == "" and rows[1]["macs.router"] == "200000"


@pytest.mark.parametrize("seeds", [(), (0,), (0, 1, 2)])
def test_all_files_are_written(tmp_path, seeds):
    path = write_comparison(tmp_path, {**gathered(seeds), "command": "compare --x=<script>"})
    page = path.read_text(encoding="utf-8")
    assert "<script>" not in page and 'src="http' not in page and "<link" not in page
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == (list(seeds) or [0])
    pngs = {file.name for file in tmp_path.glob("*.png")}
    expected = {"curves.png", "macs.png", "epsilon.png", "load_per_class.png"} if seeds else set()
    assert pngs == expected and page.count("data:image/png") == len(expected)


def test_points_of_equal_cost_are_set_side_by_side():
    places = side_by_side({"a": 100.0, "b": 10.0, "c": 100.0}, 100.0)
    assert places["b"] == 10 and places["a"] != places["c"]
    assert (places["a"] + places["c"]) / 2 == pytest.approx(100)
    assert abs(places["a"] - places["c"]) < 3


def test_the_axis_of_costs_begins_where_there_is_something_to_see():
    assert left_end([10.0, 100.0]) == 0
    assert left_end([100.0]) == 0 == left_end([100.0, 100.0])
    assert left_end(iter([60.0, 80.0])) == pytest.approx(57.0)
    assert left_end([99.0, 100.0]) == pytest.approx(80.0)


def test_rows_are_told_apart_by_their_own_style_or_one_from_the_palette():
    own = {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.2}
    rows = {"a": {"style": own}, "b": {"style": {}}, "c": {}, "d": {"style": {"color": "red"}}}
    styles = row_styles({"rows": rows})
    assert styles["a"] == own and styles["d"]["color"] == "red"
    drawn = {tuple(style[x] for x in ("color", "marker", "linestyle")) for style in styles.values()}
    assert len(drawn) == 4
    many = row_styles({"rows": {str(i): {} for i in range(72)}}).values()
    assert len({tuple(style.values()) for style in many}) == 72


def test_a_verdict_is_written_of_rows_that_are_judged():
    found = gathered()
    found["rows"]["advmoe_pathway"]["judged"] = False
    assert verdicts(found) == []
    found["rows"]["at_dense"]["judged"] = True  # the reference is not held against itself
    assert verdicts(found) == []
