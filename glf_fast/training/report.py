"""report.html: pictures, curves, scores and settings of a run on one self-contained page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from glf_fast import models, page
from glf_fast.distributed import by_main
from glf_fast.models import Words
from glf_fast.training import report_battery, runs, sequence_scoring
from glf_fast.training.pictures import latest_picture, saved_pictures
from glf_fast.training.scoring import likelihood_line

__all__ = ["write"]

# Curves in a row.
_COLUMNS = 4
_TEMPLATE = Path(__file__).with_name("report.html")


@by_main
def write(run: Path) -> Path:
    """Write run/report.html from the present files of the run's folder; empty sections are left out."""
    config, records, scores = runs.read_config(run), runs.read_metrics(run), runs.read_scores(run)
    seen = records[-1] if records else {"images": 0, "epoch": 0.0}
    finished = any(record.get("finished") and record["images"] == seen["images"] for record in records)
    kind = models.kind(config.model.name)
    what = ", ".join(filter(None, (kind.words.title, config.model.summary())))
    state = "finished" if finished else f"{seen['epoch']:.3g} epochs so far"
    body = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        samples=_picture(path, "Samples") if (path := latest_picture(run, "samples")) else "No samples yet.",
        scores="".join(_score_card(score, kind.sampling_modes) for score in scores) or _score_so_far(records),
        sections=report_battery.section(scores)
        + _growth(run)
        + _test_pictures(run, kind.words)
        + _curves(records, kind.words),
        config=html.escape((run / "config.toml").read_text(encoding="utf-8")),
        protocol=html.escape(json.dumps(_without_pictures(scores), indent=2, ensure_ascii=False)),
    )
    subtitle = f"{what}, on {config.data.source}. {seen['images']:,} images seen, {state}."
    page.write(run / "report.html", run.resolve().name, subtitle, body)
    return run / "report.html"


def _without_pictures(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores without what is text of base64 alone."""
    return [
        score
        | (
            {"battery": [{k: v for k, v in n.items() if k != "picture"} for n in score["battery"]]}
            if "battery" in score
            else {}
        )
        for score in scores
    ]


# -- scores ---------------------------------------------------------------------------------------------------------------


def _score_card(score: dict[str, Any], modes: Mapping[str, str]) -> str:
    if "sequences" in score:
        return _sequence_card(score)
    samples, rebuilt, settings = score["samples"], score["reconstructions"], score["settings"]
    floors, checkpoint = samples["floors"], score["checkpoint"]
    bars = {
        "samples": samples["value"],
        **({"reconstructions": rebuilt["value"]} if rebuilt else {}),
        "real train / test": floors["train/test"],
        "real train / train": floors["train/train"],
    }
    longest = max(max(bars.values()), 1e-9)
    rows = "".join(
        f'<div class="bar"><span>{name}</span><span class="track"><i class="{"" if name.startswith("real") else "model"}" '
        f'style="width:{100 * max(value, 0) / longest:.1f}%"></i></span><span>{value:.2f}</span></div>'
        for name, value in bars.items()
    )
    details = [f"{settings['n']:,} samples against {samples['protocol']['reference']['n']:,} test images"]
    if samples["interval"]:
        details.append(f"95 % interval {samples['interval'][0]:.2f} … {samples['interval'][1]:.2f}")
    if samples["kid"]:
        details.append(f"KID {samples['kid']['mean']:.4f} ± {samples['kid']['std']:.4f}")
    if samples["precision"] is not None:
        details.append(f"precision {samples['precision']:.3f}, recall {samples['recall']:.3f}")
    if settings["temperature"] != 1:
        details.append(f"temperature {settings['temperature']:g}")
    if mode := settings["mode"]:
        details.append(modes.get(mode, mode))
    details.append(f"checkpoint “{checkpoint['name']}”, epoch {checkpoint['epoch']:.4g}")
    if density := score["likelihood"]:
        details.append(likelihood_line(density))
    details += samples["notes"]
    metric, line = html.escape(samples["metric"]), html.escape(" · ".join(details))
    return (
        f'<div class="card"><div class="label">{metric}, lower is better</div>'
        f'<div class="number">{samples["value"]:.2f}</div><div class="label">{line}</div>{rows}</div>'
    )


def _sequence_card(score: dict[str, Any]) -> str:
    samples, settings, checkpoint = score["sequences"]["samples"], score["settings"], score["checkpoint"]
    told = "".join(f"<div>{html.escape(line)}</div>" for line in sequence_scoring.lines(score))
    about = f"checkpoint “{checkpoint['name']}”, epoch {checkpoint['epoch']:.4g}"
    if settings["temperature"] != 1:
        about += f", temperature {settings['temperature']:g}"
    if settings["mode"]:
        about += f", mode {settings['mode']}"
    return (
        f'<div class="card"><div class="label">valid samples</div><div class="number">{samples["valid"]:.3f}</div>'
        f'<div class="label">{html.escape(about)}</div>{told}</div>'
    )


def _score_so_far(records: Sequence[dict[str, Any]]) -> str:
    latest = next((record for record in reversed(records) if "score" in record), None)
    if latest is None:
        return '<div class="card"><div class="label">There are no scores.</div></div>'
    score = latest["score"]
    rebuilt = f"reconstructions {score['reconstructions']:.2f}" if score["reconstructions"] is not None else ""
    metric = html.escape(score["metric"])
    return (
        f'<div class="card"><div class="label">{metric} after {latest["epoch"]:.4g} epochs, lower is better'
        f'</div><div class="number">{score["value"]:.2f}</div>'
        f'<div class="label">{rebuilt}</div></div>'
    )


# -- pictures -------------------------------------------------------------------------------------------------------------


def _picture(path: Path, caption: str) -> str:
    text = f"{caption}, after {int(path.stem):,} training {'sequences' if path.suffix == '.txt' else 'images'}"
    if path.suffix == ".txt":
        written = html.escape(path.read_text(encoding="utf-8", errors="replace"))
        return f"<figure><pre>{written}</pre><figcaption>{text}</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _growth(run: Path) -> str:
    """Samples from the same noise at up to five moments of training."""
    paths = saved_pictures(run, "samples")
    if len(paths) < 3:
        return ""
    count = min(5, len(paths))
    chosen = [paths[i * (len(paths) - 1) // (count - 1)] for i in range(count)]
    figures = "".join(_picture(path, "Samples") for path in chosen)
    text = "All pictures are drawn from the same noise."
    return f'<h2>Samples during training</h2><p>{text}</p><div class="strip">{figures}</div>'


def _test_pictures(run: Path, words: Words) -> str:
    texts = {
        "classes": "A row for each class, in the order of their labels; the noise of all rows is the same.",
        "reconstructions": "Below each row of test images are their reconstructions.",
        "reconstructions.txt": "Below each test sequence is its reconstruction.",
        "interpolations": html.escape(words.interpolations),
    }
    sections = ""
    for kind in ("classes", "reconstructions", "interpolations"):
        if path := latest_picture(run, kind):
            text = texts.get(kind + path.suffix, texts[kind])
            title = kind.capitalize()
            sections += f'<h2>{title}</h2><p>{text}</p><div class="card">{_picture(path, title)}</div>'
    return sections


# -- curves ---------------------------------------------------------------------------------------------------------------


def _curves(records: Sequence[dict[str, Any]], words: Words) -> str:
    hidden = {"images", "epoch", "images_per_second", "score", "finished"}
    steps = [record for record in records if "images_per_second" in record]
    scored = [record for record in records if "score" in record]
    if len(steps) < 2:
        return ""
    logged = dict.fromkeys(name for record in steps for name in record if name not in hidden)
    terms = {name: name for name in logged if not name.startswith("lr_")}
    # A run that was started by an earlier version may have few records of a curve.
    chosen = {
        name: title for name, title in (words.curves or {}).items() if sum(name in record for record in steps) > 1
    }
    norms = {name: name.replace("_", " ", 1) for name in terms if name.startswith("gradient_")}
    terms = (chosen or terms) | norms
    count = len(terms) + bool(scored)
    rows = -(-count // _COLUMNS)
    with page.style():
        figure = page.figure(10, 2.9 * rows)
        axes = figure.subplots(rows, -(-count // rows), squeeze=False).flatten()
        for axis in axes[count:]:
            axis.set_visible(False)
        axes = axes[:count]
        for axis, (name, title) in zip(axes, terms.items(), strict=False):
            drawn = [(r["epoch"], r[name]) for r in steps if name in r]
            axis.plot(*zip(*drawn, strict=True), color=page.BLUE, linewidth=1.3)
            # The first steps have much larger losses and would flatten the rest of the curve.
            values = sorted(value for _, value in drawn[len(drawn) // 20 :])
            margin = 0.05 * (values[-1] - values[0]) or 1.0
            axis.set(title=page.no_maths(title), xlabel="epoch", ylim=(values[0] - margin, values[-1] + margin))
        if scored:
            epochs = [r["epoch"] for r in scored]
            for key, label, color in (
                ("value", "samples", page.BLUE),
                ("reconstructions", "reconstructions", page.ORANGE),
            ):
                values = [r["score"][key] for r in scored]
                if None not in values:
                    axes[-1].plot(epochs, values, "o-", label=label, color=color, markersize=3)
            axes[-1].set(title=page.no_maths(scored[-1]["score"]["metric"]), xlabel="epoch", ylim=(0, None))
            axes[-1].legend()
        for axis in axes:
            axis.grid(color=page.GREY, alpha=0.25, linewidth=0.5)
        svg = page.svg(figure)
    about = "Losses are means over training batches."
    if norms:
        about += " Norms of gradients are those before clipping, of each network by its own loss."
    if scored:
        about += " Scores compare what is generated with test data."
    text = html.escape(f"{about} {words.about_curves}".rstrip())
    return f'<h2>Curves</h2><p>{text}</p><div class="card">{svg}</div>'
