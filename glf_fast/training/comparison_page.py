"""The results of a comparison as files: JSON with everything, a Markdown table, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from glf_fast import page
from glf_fast.distributed import by_main
from glf_fast.files import atomic_write, write_json
from glf_fast.metrics import USUAL, shown
from glf_fast.training import comparison_sequences
from glf_fast.training.comparison_tables import (
    FORMAT,
    HTML,
    JSON,
    MARKDOWN,
    REAL,
    first_run,
    html_table,
    table,
    tomllib,
    unfinished,
)

__all__ = ["FORMAT", "HTML", "JSON", "MARKDOWN", "columns", "markdown", "published", "write"]

_TEMPLATE = Path(__file__).with_name("comparison.html")
_PUBLISHED = Path(__file__).parent.parent / "presets" / "compare" / "published" / "fid.toml"
# Columns of scores that a comparison may leave out, beside the battery's.
_SCORE_OF = {"KID": "kid", "precision": "pr", "recall": "pr"}


@by_main
def write(folder: Path, record: dict[str, Any]) -> None:
    """Write comparison.json, comparison.md and comparison.html from the record of a comparison and its pictures."""
    if record["kind"] == "tokens":
        comparison_sequences.write(folder, record)
        return
    record = record | {"published": published(record)}
    write_json(folder / JSON, record)
    with atomic_write(folder / MARKDOWN) as temporary:
        temporary.write_text(markdown(record), encoding="utf-8")
    page.write(folder / HTML, _title(record), _protocol(record), _body(folder, record))


def published(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The published FIDs of these rows on this data set; numbers that nobody has read in a source are left out."""
    entries = tomllib.loads(_PUBLISHED.read_text(encoding="utf-8"))["fid"]
    data = record["data"]["source"]
    names = [row["name"] for row in record["rows"]]
    found = [e for e in entries if e["status"] == "verified" and e["data"] == data and e["row"] in names]
    return sorted(found, key=lambda entry: names.index(entry["row"]))


# -- the table ------------------------------------------------------------------------------------------------------------


def columns(record: dict[str, Any]) -> list[list[str]]:
    """The table as text: its head, a line for each row, and a line of distances between real images.

    Columns in which no line has anything are left out.
    """
    metrics, asked = list(record["floors"]), record.get("scores", USUAL)
    distances = [f"{metric} (95 %)" for metric in metrics]
    head = ["", "state", *distances, "over seeds, mean ± sd (n)", "reconstructions", "from N(0, I)", "KID", "precision"]
    battery = _battery(record)
    head += ["recall", *battery, "bits per dimension", "minutes", "parameters"]
    lines = [{"": row["name"], **_line(row, metrics)} for row in record["rows"]]
    real = {f"{metric} (95 %)": f"{floors['train/test']:.2f}" for metric, floors in record["floors"].items()}
    real |= {title: shown(number["real"]) for title, number in battery.items()}
    lines += [{"": REAL, **real}] if real else []
    head = [name for name in head if _SCORE_OF.get(name, "fd") in {"fd", *asked}]
    drawn = [name for name in head if not name or any(line.get(name) for line in lines)]
    return [drawn, *([line.get(name, "") for name in drawn] for line in lines)]


def _battery(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of the battery that the comparison asks for, of its first row that has them, by the titles of columns."""
    found: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        for score in ((run := first_run(row)) and run["scores"]) or ():
            for number in score.get("battery", ()):
                if number["score"] in record.get("scores", ()):
                    found.setdefault(number["name"], number)
    return found


def _line(row: dict[str, Any], metrics: Sequence[str]) -> dict[str, str]:
    """The texts of a row, by column."""
    run = first_run(row)
    if run is None:
        return {f"{metrics[0]} (95 %)" if metrics else "state": row["runs"][0]["state"]}
    scores = {score["samples"]["metric"]: score for score in run["scores"]}
    line = {f"{metric} (95 %)": _distance(score["samples"]) for metric, score in scores.items()}
    line |= {"minutes": f"{run['minutes']:.1f}", "parameters": f"{row['parameters']:,}"}
    if not metrics or metrics[0] not in scores:
        return line
    score, prior = scores[metrics[0]], _prior_of(run, metrics[0])
    samples, rebuilt, density = score["samples"], score["reconstructions"], score["likelihood"]
    numbers = [number for score in run["scores"] for number in score.get("battery", ())]
    line |= {number["name"]: shown(number["value"]) for number in numbers}
    return line | {
        "over seeds, mean ± sd (n)": _over_seeds(row, metrics[0]),
        "reconstructions": f"{rebuilt['value']:.2f}" if rebuilt else "",
        "from N(0, I)": "" if prior is None else f"{prior:.2f}",
        "KID": f"{samples['kid']['mean']:.4f}" if samples["kid"] else "",
        **{key: "" if samples[key] is None else f"{samples[key]:.3f}" for key in ("precision", "recall")},
        "bits per dimension": f"{density['value']:.3f}" if density and density["value"] is not None else "",
    }


def _prior_of(run: dict[str, Any], metric: str) -> float | None:
    """The distance of samples from the standard normal prior instead of the fitted density, if the model has such samples."""
    return next((s["samples"]["value"] for s in run["prior_scores"] if s["samples"]["metric"] == metric), None)


def _distance(samples: dict[str, Any]) -> str:
    value, interval = samples["value"], samples["interval"]
    return f"{value:.2f}" + (f" ({interval[0]:.2f} … {interval[1]:.2f})" if interval else "")


def _over_seeds(row: dict[str, Any], metric: str) -> str:
    """Mean and standard deviation of a distance over the seeds of a row, if there are several."""
    values = [
        score["samples"]["value"]
        for run in row["runs"]
        for score in run["scores"]
        if score["samples"]["metric"] == metric
    ]
    if len(values) < 2:
        return ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def _published_cells(entry: dict[str, Any]) -> list[str]:
    value = f"{entry['value']:g}" + (f" ± {entry['deviation']:g}" if "deviation" in entry else "")
    return [entry["row"], value, entry.get("what", ""), entry["source"]]


def _protocol(record: dict[str, Any]) -> str:
    """The settings that all rows share, in sentences."""
    n, real = record["samples"], min(record["samples"], record["test_images"])
    first = next(iter(record["floors"]), "the first distance")
    return (
        f"All rows were trained on {record['data']['name']} for {_epochs(record)} in batches of "
        f"{record['batch_size']}, with the settings of size {record['size']}. Distances compare {n:,} samples of the best "
        f"checkpoint with {real:,} test images, lower is better; intervals are for another draw of the samples. "
        f"Reconstructions, samples from N(0, I), KID, precision and recall use the features of {first}. Minutes include "
        f"the scores during training. {record['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + "."
    )


_OTHER_PROTOCOL = (
    "These numbers come from the papers. They were computed with other networks, budgets, samples and code, and with Inception "
    "features; they cannot be compared with the table above."
)


# -- Markdown -------------------------------------------------------------------------------------------------------------


def markdown(record: dict[str, Any]) -> str:
    """The table as Markdown that is also readable as plain text, with the protocol and the published numbers."""
    parts = [f"# {_title(record)}", _protocol(record), table(columns(record))]
    if lines := unfinished(record):
        parts.append("\n".join(f"* {line}" for line in lines))
    if known := record["published"]:
        rows = [["", "FID", "samples", "source"], *map(_published_cells, known)]
        parts += ["## Published, FID, other protocol", _OTHER_PROTOCOL, table(rows)]
    return "\n\n".join(parts) + "\n"


def _epochs(record: dict[str, Any]) -> str:
    return f"{record['epochs']} epoch{'s' * (record['epochs'] > 1)}"


def _title(record: dict[str, Any]) -> str:
    return f"Models on {record['data']['name']}, size {record['size']}, {_epochs(record)}"


# -- HTML -----------------------------------------------------------------------------------------------------------------


def _body(folder: Path, record: dict[str, Any]) -> str:
    settings = "".join(
        f"<h3>{html.escape(name)}</h3><pre>{html.escape(text)}</pre>"
        for name, text in [*record["settings"].items(), *((row["name"], row["settings"]) for row in record["rows"])]
    )
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        bars=_bars(record),
        table=html_table(columns(record)),
        unfinished="".join(f"<p>{html.escape(line)}</p>" for line in unfinished(record)),
        published=_html_published(record),
        samples=_samples(folder, record),
        ends="Reconstructions",
        about_ends="The same test images for all models.",
        reconstructions=_reconstructions(folder, record),
        settings=settings,
    )


def _bars(record: dict[str, Any]) -> str:
    """A bar for the first distance of each row, with its interval, and a mark at the distance of its reconstructions."""
    metric = next(iter(record["floors"]), None)
    if metric is None:
        return ""
    drawn: list[tuple[str, str, float, list[float] | None, float | None]] = []
    for row in record["rows"]:
        run = first_run(row)
        for score in run["scores"] if run else ():
            if score["samples"]["metric"] == metric:
                samples, rebuilt = score["samples"], score["reconstructions"]
                mark = rebuilt["value"] if rebuilt else None
                drawn.append((row["name"], "model", samples["value"], samples["interval"], mark))
    drawn.append((REAL, "real", record["floors"][metric]["train/test"], None, None))
    longest = max(max(value, mark or 0.0, *(interval or ())) for _, _, value, interval, mark in drawn) or 1.0

    def place(value: float) -> str:
        return f"{100 * max(value, 0) / longest:.1f}%"

    bars = ""
    for name, kind, value, interval, mark in drawn:
        track = f'<i class="{kind}" style="width:{place(value)}"></i>'
        if interval:
            track += f'<u style="left:{place(interval[0])};width:{place(interval[1] - interval[0])}"></u>'
        if mark is not None:
            track += f'<b style="left:{place(mark)}"></b>'
        bars += (
            f'<div class="bar"><span>{html.escape(name)}</span><span class="track">{track}</span>'
            f"<span>{value:.2f}</span></div>"
        )
    text = f"{metric} of samples with its 95 % interval, lower is better. Orange: reconstructions of test images."
    return f'<div class="card"><div class="label">{html.escape(text)}</div>{bars}</div>'


def _html_published(record: dict[str, Any]) -> str:
    if not record["published"]:
        return ""
    body = ""
    for entry in record["published"]:
        name, *cells = map(html.escape, _published_cells(entry))
        body += f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("", "FID", "samples", "source"))
    return (
        f"<h2>Published, FID, other protocol</h2><p>{_OTHER_PROTOCOL}</p>"
        f'<div class="card wide published"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _samples(folder: Path, record: dict[str, Any]) -> str:
    cards = ""
    for row in record["rows"]:
        if run := first_run(row):
            picture = _picture(folder / "pictures" / f"{row['name']}-samples.png", f"Samples of {row['name']}")
            what = ", ".join(filter(None, (row["title"], row["what"])))
            first = run["scores"][0]["samples"] if run["scores"] else None
            score = f"{first['metric']} {first['value']:.2f}" if first else ""
            cards += (
                f'<figure class="card">{picture}<figcaption><strong>{html.escape(row["name"])}</strong> '
                f'<span class="score">{html.escape(score)}</span><div>{html.escape(what)}</div></figcaption></figure>'
            )
    return f'<div class="samples">{cards}</div>' if cards else "<p>No row is finished.</p>"


def _reconstructions(folder: Path, record: dict[str, Any]) -> str:
    strips = [("test images", folder / "pictures" / "test.png")]
    strips += [(row["name"], folder / "pictures" / f"{row['name']}-reconstructions.png") for row in record["rows"]]
    done = {row["name"] for row in record["rows"] if first_run(row)} | {"test images"}
    return "".join(
        f'<figure class="strip"><figcaption>{html.escape(name)}</figcaption>{_picture(path, f"Images of {name}")}</figure>'
        for name, path in strips
        if name in done and path.is_file()
    )


def _picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
