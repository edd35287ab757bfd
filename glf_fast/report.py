"""report.html: a run on one page that needs nothing but itself: pictures, curves, scores, settings."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from glf_fast import runs
from glf_fast.files import atomic_write
from glf_fast.pictures import latest_picture

__all__ = ["write"]

_TEMPLATE = Path(__file__).with_name("report.html")
# Replaced by the page's own text colour, so that curves suit light and dark.
_INK = "#010203"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glf_fast",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_BLUE, _ORANGE, _GREY = "#4f6fe8", "#e0803a", "#8a8d98"


def write(run: Path) -> Path:
    """Write run/report.html from what is in the run's folder now; sections with nothing to show are left out."""
    config, records, scores = runs.read_config(run), runs.read_metrics(run), runs.read_scores(run)
    seen = records[-1] if records else {"images": 0, "epoch": 0.0}
    finished = any(record.get("finished") and record["images"] == seen["images"] for record in records)
    model, source = config.model, config.data.source
    what = f"{model.name.upper()}, {model.latent_dim} latent dimensions, {model.reconstruction} loss, {config.flow.kind} flow"
    state = "finished" if finished else f"{seen['epoch']:.3g} of {config.epochs} epochs"
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(run.resolve().name),
        subtitle=html.escape(f"{what}, on {source}. {seen['images']:,} images seen, {state}."),
        samples=_picture(latest_picture(run, "samples"), "Samples"),
        scores="".join(map(_score_card, scores)) or _score_so_far(records),
        sections=_growth(run) + _others(run) + _curves(records),
        config=html.escape((run / "config.toml").read_text(encoding="utf-8")),
        protocol=html.escape(json.dumps(scores, indent=2, ensure_ascii=False)),
    )
    with atomic_write(run / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run / "report.html"


# -- scores ---------------------------------------------------------------------------------------------------------------


def _score_card(score: dict[str, Any]) -> str:
    samples, rebuilt, settings = score["samples"], score["reconstructions"], score["settings"]
    floors, checkpoint = samples["floors"], score["checkpoint"]
    bars = {
        "samples": samples["value"],
        "reconstructions": rebuilt["value"],
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
    if settings["temperature"] != 1:
        details.append(f"temperature {settings['temperature']:g}")
    if settings["authors_protocol"]:
        details.append("the authors' sampling protocol")
    details.append(f"checkpoint “{checkpoint['name']}”, epoch {checkpoint['epoch']:.4g}")
    details += samples["notes"]
    metric, line = html.escape(samples["metric"]), html.escape(" · ".join(details))
    return (
        f'<div class="card"><div class="label">{metric}, lower is better</div>'
        f'<div class="number">{samples["value"]:.2f}</div><div class="label">{line}</div>{rows}</div>'
    )


def _score_so_far(records: Sequence[dict[str, Any]]) -> str:
    latest = next((record for record in reversed(records) if "score" in record), None)
    if latest is None:
        return '<div class="card"><div class="label">No score yet.</div></div>'
    score = latest["score"]
    metric = html.escape(score["metric"])
    return (
        f'<div class="card"><div class="label">{metric} after {latest["epoch"]:.4g} epochs, lower is better'
        f'</div><div class="number">{score["value"]:.2f}</div>'
        f'<div class="label">reconstructions {score["reconstructions"]:.2f}</div></div>'
    )


# -- pictures -------------------------------------------------------------------------------------------------------------


def _picture(path: Path | None, caption: str) -> str:
    if path is None:
        return f"<figure><figcaption>{caption}: none yet</figcaption></figure>"
    data = base64.b64encode(path.read_bytes()).decode()
    text = f"{caption}, after {int(path.stem):,} training images"
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _growth(run: Path) -> str:
    """The same noise at up to five moments of training."""
    paths = sorted((run / "samples").glob("*.png"))
    if len(paths) < 3:
        return ""
    count = min(5, len(paths))
    chosen = [paths[i * (len(paths) - 1) // (count - 1)] for i in range(count)]
    figures = "".join(_picture(path, "Samples") for path in chosen)
    return f'<h2>How the samples grew</h2><p>The same noise each time.</p><div class="strip">{figures}</div>'


def _others(run: Path) -> str:
    texts = {
        "reconstructions": "Test images, and below each row what the model makes of them.",
        "interpolations": "From one test image to another along an arc in the flow's Gaussian space.",
    }
    sections = ""
    for kind, text in texts.items():
        if path := latest_picture(run, kind):
            title = kind.capitalize()
            sections += f'<h2>{title}</h2><p>{text}</p><div class="card">{_picture(path, title)}</div>'
    return sections


# -- curves ---------------------------------------------------------------------------------------------------------------


def _curves(records: Sequence[dict[str, Any]]) -> str:
    steps = [record for record in records if "loss" in record]
    scored = [record for record in records if "score" in record]
    if len(steps) < 2:
        return ""
    hidden = {"images", "epoch", "images_per_second"}
    terms = [name for name in steps[0] if name not in hidden and not name.startswith("lr_")]
    terms = [name for name in terms if name != "loss"] or terms
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = figure.subplots(1, len(terms) + bool(scored), squeeze=False)[0]
        for axis, name in zip(axes, terms, strict=False):
            axis.plot([r["epoch"] for r in steps], [r[name] for r in steps], color=_BLUE, linewidth=1.3)
            # The first steps are far off and would flatten the rest.
            values = sorted(r[name] for r in steps[len(steps) // 20 :])
            margin = 0.05 * (values[-1] - values[0]) or 1.0
            axis.set(title=name, xlabel="epoch", ylim=(values[0] - margin, values[-1] + margin))
        if scored:
            epochs = [r["epoch"] for r in scored]
            for key, label, color in (("value", "samples", _BLUE), ("reconstructions", "reconstructions", _ORANGE)):
                axes[-1].plot(epochs, [r["score"][key] for r in scored], "o-", label=label, color=color, markersize=3)
            axes[-1].set(title=scored[-1]["score"]["metric"], xlabel="epoch", ylim=(0, None))
            axes[-1].legend()
        for axis in axes:
            axis.grid(color=_GREY, alpha=0.25, linewidth=0.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    text = "Losses of the training batches; scores against test images."
    if "nll" in terms:
        text += " The encoder is free to rescale its codes, and nll counts that: it may rise while the samples improve."
    return f'<h2>Curves</h2><p>{text}</p><div class="card">{svg}</div>'
