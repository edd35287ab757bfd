"""The results of a comparison of models of sequences as files: JSON, Markdown, and one self-contained HTML page."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from glf_fast import page
from glf_fast.files import atomic_write, write_json
from glf_fast.training.comparison_tables import (
    HTML,
    JSON,
    MARKDOWN,
    first_run,
    html_table,
    table,
    tomllib,
    unfinished,
)

__all__ = ["write"]

_TEMPLATE = Path(__file__).with_name("comparison.html")
_PUBLISHED = Path(__file__).parent.parent / "presets" / "compare" / "sequences" / "published" / "scores.toml"
_OTHER_PROTOCOL = (
    "These numbers are those of points that a Bayesian optimisation proposes, to be held beside the columns of searches. They "
    "come from other budgets, optimisers and code, and decode each point many times at random: they say what to expect, and "
    "cannot be compared digit by digit."
)


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write comparison.json, comparison.md and comparison.html from the record of a comparison of models of sequences."""
    record = record | {"published": _published(record)}
    write_json(folder / JSON, record)
    with atomic_write(folder / MARKDOWN) as temporary:
        temporary.write_text(_markdown(record), encoding="utf-8")
    page.write(folder / HTML, _title(record), _protocol(record), _body(record))


def _published(record: dict[str, Any]) -> list[dict[str, Any]]:
    entries = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))["scores"]
    names = [row["name"] for row in record["rows"]]
    return [entry for entry in entries if entry["data"] == record["data"]["source"] and entry["row"] in names]


# -- tables ---------------------------------------------------------------------------------------------------------------


def _columns(record: dict[str, Any]) -> list[list[str]]:
    """The table as text: its head, and a line for each row. Columns in which no line has anything are left out."""
    lines = [{"": row["name"], **_line(row)} for row in record["rows"]]
    names = list(dict.fromkeys(name for line in lines for name in line))
    shown = [name for name in names if not name or any(line.get(name) for line in lines)]
    return [shown, *([line.get(name, "") for name in shown] for line in lines)]


def _line(row: dict[str, Any]) -> dict[str, str]:
    """The texts of a row, by column."""
    run = first_run(row)
    if run is None:
        return {"state": row["runs"][0]["state"]}
    found = run["scores"][0]["sequences"]
    samples, search, right = found["samples"], found["search"], found["reconstructed"]
    line = {
        "valid": _over_seeds(row, "valid", 3),
        "unique": _over_seeds(row, "unique", 3),
        "novel": _over_seeds(row, "novel", 3),
        "mean objective": _over_seeds(row, "mean", 2),
        **{f"valid, mode {mode}": f"{other['valid']:.3f}" for mode, other in found["modes"].items()},
        **{f"mean, mode {mode}": _number(other["mean"], 2) for mode, other in found["modes"].items()},
        "reconstructed": _number(right, 3),
    }
    if search:
        line["searches: valid"] = _pair(search["valid"])
        line["searches: mean objective"] = _pair(search["mean"])
        line["best of the start"] = _pair(search["best_known"])
        line["best of a search"] = _pair(search["best_tried"])
        line["best found"] = _number(search["best"][0][0], 4) if search["best"] else ""
    elif samples["best"]:
        line["best sample"] = _number(samples["best"][0][0], 4)
    return line | {"minutes": f"{run['minutes']:.1f}", "parameters": f"{row['parameters']:,}"}


def _over_seeds(row: dict[str, Any], name: str, digits: int) -> str:
    """A score of the samples; with its standard deviation over the trainings of a row, if there are several."""
    values = [score["sequences"]["samples"][name] for run in row["runs"] for score in run["scores"]]
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return _number(values[0], digits) if values else ""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _pair(numbers: Sequence[float | None]) -> str:
    mean, deviation = numbers
    return _number(mean, 2) + (f" ± {deviation:.2f}" if mean is not None and deviation is not None else "")


def _best(record: dict[str, Any]) -> list[list[str]]:
    """The best texts of each row: of its searches, or of its samples."""
    rows = [["", "objective", "text"]]
    for row in record["rows"]:
        if run := first_run(row):
            found = run["scores"][0]["sequences"]
            best = found["search"]["best"] if found["search"] else found["samples"]["best"]
            rows += [[row["name"], f"{value:.4f}", f"`{text}`"] for value, text in best]
    return rows


def _published_rows(record: dict[str, Any]) -> list[list[str]]:
    rows = [["", "valid", "mean objective", "source"]]
    for entry in record["published"]:
        mean = f"{entry['mean']:g}" + (f" ± {entry['deviation']:g}" if "deviation" in entry else "")
        rows.append([entry["row"], f"{entry['valid']:.2f}", mean, f"{entry['source']} ({entry['status']})"])
    return rows


# -- words ----------------------------------------------------------------------------------------------------------------


def _title(record: dict[str, Any]) -> str:
    epochs = record["epochs"]
    return f"Models on {record['data']['name']}, size {record['size']}, {epochs} epoch{'s' * (epochs > 1)}"


def _protocol(record: dict[str, Any]) -> str:
    """The settings that all rows share, in sentences."""
    searches = [found["search"] for found in _scores(record) if found["search"]]
    objective = next((found["objective"] for found in _scores(record) if found["objective"]), "")
    text = (
        f"All rows were trained on {record['data']['name']} for {record['epochs']} epochs in batches of "
        f"{record['batch_size']}, with the settings of size {record['size']}. Shares and means are those of "
        f"{record['samples']:,} samples of the last checkpoint, decoded once each to the most probable sequence; unique is a "
        f"share of the valid samples, novel a share of the different ones that the training set does not have. "
    )
    if objective:
        text += f"The objective is {objective}, lower is better, and its mean is that of the valid samples. "
    if searches:
        search = searches[0]
        text += (
            f"Searches are {search['seeds']} Bayesian optimisations of {search['rounds']} rounds of {search['batch']} points "
            "by expected improvement. They begin with the codes of "
            f"{search['known']} training sequences and the values of what these codes are decoded to. "
            "Their numbers are means and deviations over the seeds, of all points that were tried. "
        )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"{text}Minutes are those of training, without scores. {record['machine']}; {versions}."


def _scores(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [run["scores"][0]["sequences"] for row in record["rows"] if (run := first_run(row))]


def _samples(row: dict[str, Any]) -> tuple[str, str] | None:
    """The first samples of a row, and its first interpolation, as text."""
    run = first_run(row)
    if run is None:
        return None
    found = run["scores"][0]["sequences"]
    return "\n".join(found["texts"]), "\n".join((found["interpolations"] or [[]])[0])


def _markdown(record: dict[str, Any]) -> str:
    parts = [f"# {_title(record)}", _protocol(record), table(_columns(record))]
    if lines := unfinished(record):
        parts.append("\n".join(f"* {line}" for line in lines))
    if len(best := _best(record)) > 1:
        parts += ["## Best sequences", table(best)]
    if record["published"]:
        parts += ["## Published, other protocol", _OTHER_PROTOCOL, table(_published_rows(record))]
    for row in record["rows"]:
        if shown := _samples(row):
            parts += [f"## Samples of {row['name']}", f"```\n{shown[0]}\n```"]
            parts += [f"From one test sequence to another:\n\n```\n{shown[1]}\n```"] if shown[1] else []
    return "\n\n".join(parts) + "\n"


def _body(record: dict[str, Any]) -> str:
    settings = "".join(
        f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>"
        for name, text in [*record["settings"].items(), *((row["name"], row["settings"]) for row in record["rows"])]
    )
    cards = ways = ""
    for row in record["rows"]:
        if shown := _samples(row):
            what = html.escape(", ".join(filter(None, (row["title"], row["what"]))))
            name = html.escape(row["name"])
            cards += (
                f'<figure class="card"><pre>{html.escape(shown[0])}</pre><figcaption><strong>{name}</strong>'
                f"<div>{what}</div></figcaption></figure>"
            )
            ways += f'<figure class="strip"><figcaption>{name}</figcaption><pre>{html.escape(shown[1])}</pre></figure>'
    best = [[cell.strip("`") for cell in row] for row in _best(record)]
    published = ""
    if record["published"]:
        published = f"<h2>Published, other protocol</h2><p>{_OTHER_PROTOCOL}</p>{html_table(_published_rows(record))}"
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        bars="",
        table=html_table(_columns(record)) + (f"<h2>Best sequences</h2>{html_table(best)}" if len(best) > 1 else ""),
        unfinished="".join(f"<p>{html.escape(line)}</p>" for line in unfinished(record)),
        published=published,
        samples=f'<div class="samples">{cards}</div>' if cards else "<p>No row is finished.</p>",
        ends="From one test sequence to another",
        about_ends="The same test sequences for all models. Each different text on the way is a line.",
        reconstructions=ways,
        settings=settings,
    )
