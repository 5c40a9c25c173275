"""Parts of self-contained HTML pages: nothing to download, nothing that runs.

Whatever is not called ``..._html`` is text, and is escaped here.
"""

import base64
import html
from collections.abc import Mapping, Sequence

STYLE = """
html { font-size: 16px; }
body { font: 1rem/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1a1a1a;
  background: #fff; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ccc; }
.headline { display: flex; flex-wrap: wrap; gap: 1rem; }
.headline div { flex: 1 1 20rem; border: 1px solid #ccc; border-radius: 6px; padding: .7rem 1rem; }
.headline strong { display: block; font-size: 2.2rem; line-height: 1.2; }
.headline small { color: #444; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; font-size: .92rem; } .scroll td { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #888; }
.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
.facts th { font-weight: 600; white-space: nowrap; vertical-align: top; padding-right: 1.5rem; }
details { margin-top: 1.5rem; }
.warning { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .4rem .8rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; }
pre { font-size: .82rem; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  html { font-size: 12px; }
  body { margin: 0; padding: 0; max-width: none; }
  .scroll { overflow-x: visible; }
  h2 { break-after: avoid; }
  .headline, tr, figure { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""


def page(title: str, sections: Sequence[str], style: str = "", policy: str = "") -> str:
    """A whole page.

    Args:
        title: of the page, text.
        sections: HTML.
        style: CSS behind that of all pages.
        policy: what a browser may load and run (Content-Security-Policy); empty: says nothing.
    """
    meta = (
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        if policy
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{meta}<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def warnings_html(warnings: Sequence[str]) -> list[str]:
    """A box for each warning."""
    return [f'<p class="warning"><b>Warning:</b> {escape(text)}</p>' for text in warnings]


def facts_html(facts: Mapping[str, str]) -> str:
    """A table of names and values, without the values that are not known."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n"
        for name, value in facts.items()
        if value
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else "<p>Not recorded.</p>"


def table_html(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways where it must."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure_html(png: bytes, alt: str, caption: str = "") -> str:
    """An image inside the page, and what is to be said of it."""
    image = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{image}" alt="{escape(alt)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def escape(text: str) -> str:
    """Makes any text safe inside an element or a quoted attribute."""
    return html.escape(str(text), quote=True)
