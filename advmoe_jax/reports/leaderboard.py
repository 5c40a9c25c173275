"""Many runs on one sortable page, which needs no other file, and in a CSV for programs.

Names in runs are strangers' data. They are escaped; the page's policy lets the browser load nothing
and run nothing but the script below, which it knows by its digest.
"""

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from advmoe_jax.evaluation.statistics import Estimate
from advmoe_jax.files import write_text
from advmoe_jax.reports.page import escape, page, warnings_html
from advmoe_jax.reports.standings import Attack, Line
from advmoe_jax.reports.table import integer, is_number, number, radius

STYLE = """
body { max-width: none; }
#find { font: inherit; padding: .3rem .6rem; width: 22rem; max-width: 100%; margin-bottom: .8rem; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072B2; }
th button::after { content: " \\2195"; color: #aaa; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #000; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #000; }
th.text, td.text { text-align: left; }
tbody td { vertical-align: top; }
.scroll td.text { white-space: normal; overflow-wrap: anywhere; min-width: 8.5rem; }
.scroll td.name { min-width: 12rem; font-weight: 600; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; z-index: 1; }
td small { color: #555; display: block; font-weight: 400; }
tbody tr:hover { background: #f3f7fa; }
"""

# A click sorts by a column, best first; what was not measured stays at the end.
SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const value = (row, i) => row.cells[i].dataset.value ?? "";
heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
  const before = head.getAttribute("aria-sort"), isText = head.classList.contains("text");
  const first = isText || "low" in head.dataset ? "ascending" : "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = before === first ? other : first, sign = order === "ascending" ? 1 : -1;
  heads.forEach((x) => x.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [value(a, i), value(b, i)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (isText ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  }));
}));
document.querySelector("#find").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const row of body.rows) {
    row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  }
});
"""


class _Cell(NamedTuple):
    """What a cell shows, what it is sorted by, what is small below it, and on its tooltip."""

    text: str = "–"
    value: str = ""
    below: str = ""
    hint: str = ""


class _Column(NamedTuple):
    header: str
    cell: Callable[[Line], _Cell]
    is_text: bool = False
    low_is_good: bool = False


def write_leaderboard(
    out: Path, lines: Sequence[Line], left_out: Sequence[str]
) -> tuple[Path, Path]:
    """Writes ``leaderboard.html`` and ``leaderboard.csv``, and returns their paths.

    Args:
        out: their directory; made if missing.
        lines: of the table.
        left_out: sentences on what is not in it.
    """
    html = write_text(out / "leaderboard.html", _page(lines, left_out))
    return html, write_text(out / "leaderboard.csv", leaderboard_csv(lines))


def _page(lines: Sequence[Line], left_out: Sequence[str]) -> str:
    columns = _columns(lines)
    heads = "".join(_head(column) for column in columns)
    rows = "".join(
        "<tr>" + "".join(_cell(column, line, i) for i, column in enumerate(columns)) + "</tr>\n"
        for line in lines
    )
    table = (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        "<h1>Leaderboard</h1>",
        *warnings_html(left_out),
        '<input id="find" type="search" placeholder="Show lines with these words" '
        'aria-label="Show lines with these words">',
        table,
        _notes(lines),
        f"<script>{SCRIPT}</script>",
    ]
    return page("Leaderboard", sections, style=STYLE, policy=policy)


def _head(column: _Column) -> str:
    kind = ' class="text"' if column.is_text else " data-low" if column.low_is_good else ""
    return f"<th{kind}><button>{escape(column.header)}</button></th>"


def _cell(column: _Column, line: Line, position: int) -> str:
    cell = column.cell(line)
    words = f"{'name ' if position == 0 else ''}text" if column.is_text else ""
    kind = f' class="{words}"' if words else ""
    hint = f' title="{escape(cell.hint)}"' if cell.hint else ""
    below = f"<small>{escape(cell.below)}</small>" if cell.below else ""
    return f'<td{kind} data-value="{escape(cell.value)}"{hint}>{escape(cell.text)}{below}</td>'


def _columns(lines: Sequence[Line]) -> list[_Column]:
    """The columns; those in which every line is empty are left out."""
    columns = [
        _Column("run", _name, is_text=True),
        _Column("system", lambda x: _words(x, "system"), is_text=True),
        _Column("method", lambda x: _words(x, "method"), is_text=True),
        _Column("network", lambda x: _words(x, "model"), is_text=True),
        _Column("images of", lambda x: _words(x, "dataset"), is_text=True),
        _Column("SA %", _standard),
        *(
            _Column(f"RA % {_title(attack)}", lambda x, attack=attack: _robust(x, attack))
            for attack in attacks_of(lines)
        ),
        _Column("MMACs", lambda x: _amount(x.mean("macs"), 1e6), low_is_good=True),
        _Column(
            "MMACs, leaving early", lambda x: _amount(x.mean("mean_macs"), 1e6), low_is_good=True
        ),
        _Column("parameters", lambda x: _count(x.mean("params")), low_is_good=True),
        _Column("images/s", lambda x: _count(x.mean("images_per_second"))),
        _Column("seeds", _seeds),
        _Column("commit", _commit, is_text=True),
        _Column("device", lambda x: _words(x, "device"), is_text=True),
    ]
    return [column for column in columns if any(column.cell(line).value for line in lines)]


def attacks_of(lines: Iterable[Line]) -> list[Attack]:
    """Every attack of the lines; those that most lines have are first, for they compare most."""
    counts = Counter(a for line in lines for a in {a: 0 for e in line.entries for a in e.robust})
    return sorted(counts, key=lambda attack: -counts[attack])


def _name(line: Line) -> _Cell:
    names = list(dict.fromkeys(entry.name for entry in line.entries))
    below = f"and {len(names) - 1} more" if len(names) > 1 else line.entries[0].place
    return _Cell(names[0], names[0], below, "\n".join(names))


def _words(line: Line, fact: str) -> _Cell:
    text = "; ".join(line.facts(fact))
    return _Cell(text or "–", text)


def _commit(line: Line) -> _Cell:
    commits = [
        commit[:12] + "-dirty" * commit.endswith("-dirty") for commit in line.facts("commit")
    ]
    return _Cell(", ".join(commits) or "–", ", ".join(commits))


def _seeds(line: Line) -> _Cell:
    seeds = ", ".join(line.facts("seed"))
    return _Cell(str(len(line.entries)), str(len(line.entries)), hint=f"seeds {seeds}")


def _standard(line: Line) -> _Cell:
    counts = [x.clean_examples for x in line.entries if "standard_accuracy" in x.numbers]
    return _share(line, line.mean("standard_accuracy"), counts, "")


def _robust(line: Line, attack: Attack) -> _Cell:
    measured = [x.robust[attack] for x in line.entries if attack in x.robust]
    settings = dict.fromkeys(_settings(x.settings) for x in measured)
    counts = [x.examples for x in measured]
    return _share(line, line.robust(attack), counts, "; or ".join(settings))


def _share(line: Line, found: Estimate | None, counts: Sequence[int | None], hint: str) -> _Cell:
    """An accuracy, with the number of images below it."""
    if found is None:
        return _Cell()
    text = f"{100 * found.mean:.1f}"
    if found.half_width is not None:
        text += f" ± {100 * found.half_width:.1f}"
    known = sorted({count for count in counts if count is not None})
    below = f"{' or '.join(f'{count:,}' for count in known)} images" if known else ""
    if found.count < len(line.entries):
        below += f", {found.count} of {len(line.entries)} seeds"
    return _Cell(text, repr(found.mean), below, hint)


def _amount(found: Estimate | None, unit: float) -> _Cell:
    return _Cell() if found is None else _Cell(number(found.mean / unit), repr(found.mean))


def _count(found: Estimate | None) -> _Cell:
    return _Cell() if found is None else _Cell(integer(found.mean), repr(found.mean))


def _title(attack: Attack) -> str:
    return " ".join(filter(None, [attack.name, attack.norm, radius(attack.epsilon)]))


def _settings(settings: Any) -> str:
    """The attack's settings in words, but for the ball, which the column says."""
    left_out = ("norm", "epsilon", "examples", "parts", "warnings", "seed", "network_accuracy")
    return ", ".join(
        f"{name.replace('_', ' ')} {radius(value) if is_number(value) else value}"
        for name, value in settings.items()
        if name not in left_out
    )


def _notes(lines: Sequence[Line]) -> str:
    """How to read the table, and the settings of every attack in it."""
    sentences = [
        "SA: standard accuracy; RA: robust accuracy under the attack, in its norm and epsilon. "
        "Click on a heading to sort; lines without a value stay at the end.",
        "Runs that differ in their seed alone are one line: the mean ± half of its 95% interval "
        "(Student's t), where there are several seeds. The second line of a cell is the number of "
        "test images.",
        "images/s: of a comparison, all its runs timed in turn in one process; of a single run, "
        "its own evaluation of clean images. They compare on one device alone.",
        "Robust accuracies compare where data set, attack, its settings and the images are the "
        "same; a weaker attack makes any network look better.",
    ]
    for attack in attacks_of(lines):
        found = [x.robust[attack] for line in lines for x in line.entries if attack in x.robust]
        words = [_settings(x.settings) for x in found]
        settings = "; or ".join(dict.fromkeys(filter(None, words)))
        sentences += [f"{_title(attack)}: {settings}"] if settings else []
    return f"<ul>{''.join(f'<li>{escape(x)}</li>' for x in sentences)}</ul>"


def leaderboard_csv(lines: Sequence[Line]) -> str:
    """One line of the table a line; accuracies in shares of 1, cost in MACs and parameters."""
    attacks = attacks_of(lines)
    facts = ("system", "method", "model", "dataset", "seed", "commit", "device")
    amounts = ("macs", "mean_macs", "params", "images_per_second")
    accuracies = ["SA", *(f"RA {_title(attack)}" for attack in attacks)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = ["run", *facts, "seeds"]
    header += [f"{name}{end}" for name in accuracies for end in ("", ".half_width", ".images")]
    writer.writerow(map(_harmless, [*header, *amounts]))
    for line in lines:
        places = (f"{x.name} ({x.place})" if x.place else x.name for x in line.entries)
        cells = ["; ".join(dict.fromkeys(places))]
        cells += ["; ".join(line.facts(fact)) for fact in facts]
        row: list[Any] = [*map(_harmless, cells), len(line.entries)]
        row += _accuracy(line.mean("standard_accuracy"), [x.clean_examples for x in line.entries])
        for attack in attacks:
            counts = [x.robust[attack].examples for x in line.entries if attack in x.robust]
            row += _accuracy(line.robust(attack), counts)
        for name in amounts:
            found = line.mean(name)
            row.append(None if found is None else found.mean)
        writer.writerow(row)
    return file.getvalue()


def _accuracy(found: Estimate | None, counts: Sequence[int | None]) -> list[Any]:
    if found is None:
        return [None] * 3
    known = sorted({str(count) for count in counts if count is not None})
    return [found.mean, found.half_width, ";".join(known)]


def _harmless(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
