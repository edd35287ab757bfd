"""Names of a comparison's files, and tables in Markdown and HTML, for comparisons of images and of sequences."""

from __future__ import annotations

import html
import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["FORMAT", "HTML", "JSON", "MARKDOWN", "REAL", "first_run", "html_table", "table", "tomllib", "unfinished"]

FORMAT = "glf_fast.comparison 1"
JSON, MARKDOWN, HTML = "comparison.json", "comparison.md", "comparison.html"
REAL = "real training images"


def unfinished(record: dict[str, Any]) -> list[str]:
    """A line for each run without results, with the reason."""
    return [
        f"{row['name']}, seed {run['seed']}, {run['state']}: {run['reason']}"
        for row in record["rows"]
        for run in row["runs"]
        if run["state"] != "finished"
    ]


def first_run(row: dict[str, Any]) -> dict[str, Any] | None:
    """The finished run of a row with the lowest seed, or None."""
    return next((run for run in row["runs"] if run["state"] == "finished"), None)


def table(rows: list[list[str]]) -> str:
    """A table in Markdown that is also readable as plain text; the first row is its head."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def html_table(rows: list[list[str]]) -> str:
    """A table in HTML; the first row is its head."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = ""
    for row in rows[1:]:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        kind = ' class="real"' if row[0] == REAL else ""
        body += f"<tr{kind}><th>{html.escape(row[0])}</th>{cells}</tr>"
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
