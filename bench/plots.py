"""Figures of result files, as SVG: each says on which machine, with which versions and commit it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.results import Result

__all__ = ["draw"]

OURS = "glf_fast"
COLOURS = {
    OURS: "#d1495b",
    "compile": "#00798c",
    "eager": "#66717e",
    "FrEIA": "#edae49",
    "normflows": "#7768ae",
    "nflows": "#30638e",
    "zuko": "#5fad56",
}
LABELS = {"compile": "torch.compile", "eager": "plain PyTorch"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glf_fast",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(machine: dict[str, Any], results: Sequence[Result], folder: Path) -> list[Path]:
    """Write {stem}-ratios.svg and {stem}-batch.svg into `folder`; returns those for which there were results."""
    caption = (
        f"{machine.get('gpu') or machine['cpu']['brand_raw']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"glf_fast {machine['commit']}, {machine['date'][:10]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (("ratios", _ratios(results)), ("batch", _batch(results))):
            if figure is not None:
                figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color="#66717e")
                path = folder / f"cpu-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
    return written


def _ratios(results: Sequence[Result]) -> Figure | None:
    """Every provider's time as a multiple of ours, a row a case and mode."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for r in results:
        if "floor_s" in r.info:
            times.setdefault((r.case, r.mode), {})[r.provider] = r.median
    rows = [(name, row) for name, row in times.items() if OURS in row and len(row) > 1]
    if not rows:
        return None
    figure = Figure((7.5, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(reversed(rows)):
        ratios = {name: seconds / row[OURS] for name, seconds in row.items()}
        axes.plot([min(ratios.values()), max(ratios.values())], [y, y], color="#d9dde2", zorder=1)
        for name, ratio in ratios.items():
            axes.scatter(ratio, y, s=34, color=COLOURS[name], zorder=2 + (name == OURS))
    axes.set_yticks(range(len(rows)), [f"{case}, {mode}" for (case, mode), _ in reversed(rows)])
    axes.set_xscale("log", base=2)
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.set_xlabel("time, as a multiple of glf_fast's (right is slower)")
    axes.grid(axis="x", color="#eef0f3", zorder=0)
    for name, colour in COLOURS.items():
        axes.scatter([], [], color=colour, label=LABELS.get(name, name))
    figure.legend(loc="outside upper center", ncols=7, frameon=False, handletextpad=0.1, columnspacing=1.0)
    return figure


def _batch(results: Sequence[Result]) -> Figure | None:
    """Rows per second against the batch size, for the flow that is measured at several (D 64, H 256, K 8)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in results:
        if r.mode == "log_prob" and (r.case.startswith("small-batch") or r.case in ("glf-cifar", "throughput")):
            lines.setdefault(r.provider, []).append((r.info["batch"], r.info["batch"] / r.median))
    if OURS not in lines or len(lines[OURS]) < 2:
        return None
    figure = Figure((7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for name in COLOURS:
        if name in lines:
            x, y = zip(*sorted(lines[name]), strict=True)
            axes.loglog(x, y, "o-", markersize=4, color=COLOURS[name], label=LABELS.get(name, name))
    axes.set_xlabel("batch size")
    axes.set_ylabel("log_prob, rows per second")
    axes.set_title("D 64, two hidden layers of 256, 8 steps", loc="left", fontsize=9)
    axes.grid(color="#eef0f3", which="both")
    figure.legend(loc="outside upper center", ncols=7, frameon=False, handletextpad=0.3, columnspacing=1.0)
    return figure
