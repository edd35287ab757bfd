"""The battery's part of a run's report: its table, the curve of PRD, and samples beside their nearest training images."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from glf_fast import metrics, page

__all__ = ["section"]


def section(scores: Sequence[dict[str, Any]]) -> str:
    """HTML of each score's battery (`scoring.evaluate`); "" if there is none."""
    return "".join(_section(score) for score in scores if score.get("battery"))


def _section(score: Mapping[str, Any]) -> str:
    numbers, settings = score["battery"], score["settings"]
    mode = f", mode {settings['mode']}" if settings["mode"] else ""
    about = (
        f"{settings['n']:,} samples{mode} of checkpoint “{score['checkpoint']['name']}”. The column of real images has the "
        "same numbers for training images in the samples' place, and no model is expected to be better; for distances to "
        "training images it has those of test images."
    )
    return f'<h2>More scores</h2><p>{html.escape(about)}</p><div class="card">{_table(numbers)}</div>' + "".join(
        _curve(number) + _picture(number) for number in numbers
    )


def _table(numbers: Sequence[Mapping[str, Any]]) -> str:
    head = ("score", "value", "95 %", "real images", "noise", "better", "meaning")
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(number)) + "</tr>" for number in numbers
    )
    return f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{rows}</table>"


def _cells(number: Mapping[str, Any]) -> list[str]:
    values = [metrics.shown(number["value"]), metrics.shown_interval(number)]
    anchors = [metrics.shown(number["real"]), metrics.shown(number["noise"])]
    meaning = number["note"] or f"{number['meaning']} ({number['protocol']})"
    return [number["name"], *values, *anchors, number["better"], meaning]


def _curve(number: Mapping[str, Any]) -> str:
    if "curve" not in number:
        return ""
    with page.style():
        figure = page.figure(4, 3.2)
        axis = figure.subplots()
        axis.plot(*zip(*number["curve"], strict=True), color=page.BLUE, linewidth=1.3)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axis.grid(color=page.GREY, alpha=0.25, linewidth=0.5)
        svg = page.svg(figure)
    text = "Precision and recall of distributions: the curve of a perfect model is the upper right corner."
    return (
        f'<figure class="card" style="max-width:26rem;margin-top:1.25rem">{svg}<figcaption>{text}</figcaption></figure>'
    )


def _picture(number: Mapping[str, Any]) -> str:
    if "picture" not in number:
        return ""
    source = f"data:image/png;base64,{html.escape(number['picture'])}"
    text = "The samples that are closest to a training image, and below each its nearest training image."
    return (
        f'<figure class="card" style="margin-top:1.25rem"><img alt="Nearest training images" src="{source}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
