"""A comparison's directory of tables, figures and one page, all made from what was gathered."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from advmoe_jax.evaluation.results import RESULTS
from advmoe_jax.files import write_bytes, write_json, write_text
from advmoe_jax.reports.comparison_figures import captions, comparison_figures
from advmoe_jax.reports.comparison_tables import (
    Tree,
    comparison_csv,
    comparison_markdown,
    complaints,
    difference_table,
    main_table,
    measured_rows,
    notes,
    verdicts,
)
from advmoe_jax.reports.page import (
    escape,
    facts_html,
    figure_html,
    page,
    table_html,
    warnings_html,
)
from advmoe_jax.reports.table import as_mapping


def write_comparison(root: Path, found: Tree) -> Path:
    """Writes ``results.json``, ``table.md``, ``table.csv``, figures and ``report.html``.

    Args:
        root: directory of the comparison.
        found: what the comparison gathered. Of each of its ``rows`` the reports read, besides
            numbers, ``title``, ``about``, ``style`` (settings of matplotlib's plot; empty: some are
            chosen) and ``judged`` (whether a verdict against ``reference`` is written).

    Returns:
        The path of ``report.html``, which needs no other file.
    """
    write_json(root / RESULTS, found)
    write_text(root / "table.md", comparison_markdown(found))
    write_text(root / "table.csv", comparison_csv(found))
    figures = comparison_figures(root, found)
    for name, png in figures.items():
        write_bytes(root / name, png)
    return write_text(root / "report.html", _page(found, figures))


def _page(found: Tree, figures: Mapping[str, bytes]) -> str:
    rows = measured_rows(found)
    runs = [run for row in rows.values() for run in row["runs"].values()]
    about = {(run["model"], run["dataset"]) for run in runs}
    title = "Comparison: " + ", ".join(f"{m} on {d}" for m, d in sorted(about))
    reference = as_mapping(found["rows"].get(found["reference"])).get("title", found["reference"])
    headers, differences = difference_table(found)
    sections = [
        f"<h1>{escape(title if runs else 'Comparison')}</h1>",
        *warnings_html(complaints(found)),
        _list([*verdicts(found)]),
        "<h2>Accuracy and cost</h2>",
        table_html(*main_table(found)),
        *([f"<h2>Difference to {escape(reference)}, percentage points</h2>",
           table_html(headers, differences)] if differences else []),
        _list(notes(found)),
        "<h2>The rows</h2>",
        facts_html({row["title"]: row["about"] for row in rows.values()}),
        "<h2>Figures</h2>",
        *(
            figure_html(figures[name], caption, caption)
            for name, caption in captions(found).items()
            if name in figures
        ),
        "<h2>Where these numbers come from</h2>",
        facts_html(
            {
                "Seeds": ", ".join(map(str, found["seeds"])),
                "Device": "; ".join(sorted({run["device"] for run in runs})),
                "Commit": ", ".join(sorted({str(run["git_commit"]) for run in runs})),
                "Versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
                "Command": found.get("command", ""),
                "Each run": "report.html, results.json and explanation.json in "
                "<row>/seed<seed> beside this page",
            }
        ),
        "<details><summary>The whole config</summary>"
        f"<pre>{escape(json.dumps(found['config'], indent=2))}</pre></details>",
    ]  # fmt: skip
    return page("Comparison", sections)


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""
