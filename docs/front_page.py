"""The site's first page is README.md, whose links are from one directory higher."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"


def on_files(files: Files, config: dict) -> Files:
    """Adds ``index.md`` to the site's files."""
    text = re.sub(r"\]\(docs/", "](", README.read_text(encoding="utf-8"))
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Leads links to README.md to the first page."""
    return markdown.replace("](../README.md", "](index.md")
