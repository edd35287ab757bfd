"""Figures of result files, as SVG: each says on which machine, with which versions and commit it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.results import Result, Results

__all__ = ["FIGURES", "draw"]

OURS = "glf_fast"
COLOURS = {
    OURS: "#d1495b",
    "compile": "#00798c",
    "eager": "#66717e",
    "glf_fast reversible": "#e29aa7",
    "glf_fast, graphed": "#8c1c2f",
    "eager, graphed": "#9aa3ad",
    "reduce-overhead": "#66b3bd",
    "FrEIA": "#edae49",
    "normflows": "#7768ae",
    "nflows": "#30638e",
    "zuko": "#5fad56",
    "torch.linalg": "#30638e",
    "torch.linalg, graphed": "#8aa8c4",
    "torch.linalg, cusolver": "#00798c",
    "torch.linalg, magma": "#7768ae",
    "CuPy": "#5fad56",
}
OTHER = "#b08968"
LABELS = {"compile": "torch.compile", "eager": "plain PyTorch"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glf_fast",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(found: Results, folder: Path) -> list[Path]:
    """Write every figure for which there are results, as {name}.svg, into `folder`; returns the files."""
    machine = found.machine
    caption = (
        f"{found.where}, torch {machine['torch']}, "
        f"Python {machine['python_version']}, glf_fast {machine['commit']}, {found.date[:10]}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make(found)
            if figure is not None:
                figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color="#66717e")
                path = folder / f"{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
    return written


def ratios(found: Results) -> Figure | None:
    """Every provider's time as a multiple of ours, a row a case and mode of the named flows."""
    rows = [
        (f"{case}, {mode}", {name: row.median for name, row in group.items()})
        for (suite, case, mode), group in found.groups().items()
        if suite == "flow" and OURS in group and len(group) > 1
    ]
    if not rows:
        return None
    figure = Figure((7.5, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, (_, row) in enumerate(reversed(rows)):
        times = {name: seconds / row[OURS] for name, seconds in row.items()}
        axes.plot([min(times.values()), max(times.values())], [y, y], color="#d9dde2", zorder=1)
        for name, ratio in times.items():
            axes.scatter(ratio, y, s=34, color=COLOURS.get(name, OTHER), zorder=2 + (name == OURS))
    axes.set_yticks(range(len(rows)), [label for label, _ in reversed(rows)])
    axes.set_xscale("log", base=2)
    last = max(max(row.values()) / row[OURS] for _, row in rows)
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if t <= max(16, 1.5 * last)]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.set_xlabel("time, as a multiple of glf_fast's (right is slower)")
    axes.grid(axis="x", color="#eef0f3", zorder=0)
    for name in _in_order(name for _, row in rows for name in row):
        axes.scatter([], [], color=COLOURS.get(name, OTHER), label=LABELS.get(name, name))
    figure.legend(loc="outside upper center", ncols=7, frameon=False, handletextpad=0.1, columnspacing=1.0)
    return figure


def batch(found: Results) -> Figure | None:
    """Time of a training pass against the batch, a panel a width (the suite "grid")."""
    results = [r for r in found.suite("grid") if r.mode == "train"]
    widths = sorted({(r.info["dim"], r.info["hidden"][0]) for r in results})
    if not widths:
        return None
    figure = Figure((7.5, 2.9), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for (dim, hidden), axes in zip(widths, panels, strict=True):
        here = [r for r in results if r.info["dim"] == dim]
        _lines(axes, here, lambda r: r.info["batch"], lambda r: 1e3 * r.median)
        axes.set_title(f"D {dim}, H {hidden}", loc="left", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
        axes.set_yscale("log")
        axes.set_xlabel("batch size")
    panels[0].set_ylabel("training pass, ms")
    _legend(figure, panels[0])
    return figure


def depth(found: Results) -> Figure | None:
    """Time of a training pass against the number of steps (the suite "depth")."""
    return _against_steps(found.suite("depth"), "training pass, ms (D 64, H 256, batch 256)", lambda r: 1e3 * r.median)


def memory(found: Results) -> Figure | None:
    """Peak memory of a training pass against the number of steps (the suite "memory")."""
    results = found.suite("memory")
    label = "peak extra memory of a training pass, MiB\n(D 64, H 256, batch 4,096; dashed: activations)"
    figure = _against_steps(results, label, lambda r: r.info["peak_bytes"] / 2**20)
    kept = [r for r in results if "activation_bytes" in r.info]
    if figure is not None and kept:
        _lines(figure.axes[0], kept, lambda r: r.info["steps"], lambda r: r.info["activation_bytes"] / 2**20, "--")
    return figure


def linear(found: Results) -> Figure | None:
    """Time of log|det| and inverse of a matrix against its size, a panel a batch (the suite "linear")."""
    results = [r for r in found.suite("linear") if r.mode == "forward"]
    counts = sorted({r.info["batch"] for r in results})
    if len({r.info["dim"] for r in results}) < 2:
        return None
    figure = Figure((1.5 + 2 * len(counts), 2.9), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for count, axes in zip(counts, panels, strict=True):
        here = [r for r in results if r.info["batch"] == count]
        yardsticks = {r.info["dim"]: 1e6 * r.info["yardstick_s"] / count for r in here}
        axes.plot(*zip(*sorted(yardsticks.items()), strict=True), ":", color="#66717e", label="yardstick")
        _lines(axes, here, lambda r: r.info["dim"], lambda r: 1e6 * r.median / r.info["batch"])
        axes.set_title(f"{count:,} matrices", loc="left", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = [t for t in (4, 16, 64, 192) if t <= max(yardsticks)]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel("D")
    panels[0].set_ylabel("log|det| and inverse, µs a matrix")
    _legend(figure, panels[0])
    return figure


def _against_steps(results: list[Result], label: str, value: Callable[[Result], float]) -> Figure | None:
    if len({r.info["steps"] for r in results}) < 2:
        return None
    figure = Figure((5.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _lines(axes, results, lambda r: r.info["steps"], value)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({r.info["steps"] for r in results})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("steps K")
    axes.set_ylabel(label)
    _legend(figure, axes)
    return figure


def _lines(
    axes: Axes, results: list[Result], x: Callable[[Result], float], y: Callable[[Result], float], style: str = "o-"
) -> None:
    """A line a provider."""
    points: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        points.setdefault(r.provider, []).append((x(r), y(r)))
    for name in _in_order(points):
        x_y, colour = zip(*sorted(points[name]), strict=True), COLOURS.get(name, OTHER)
        label = LABELS.get(name, name) if style == "o-" else None
        axes.plot(*x_y, style, markersize=4, color=colour, label=label)
    axes.grid(color="#eef0f3", which="major")


def _in_order(names: Iterable[str]) -> list[str]:
    """As in the table of colours; who has none comes last."""
    order = list(COLOURS)
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in COLOURS else len(order))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=7, frameon=False, handletextpad=0.3, columnspacing=1.0
    )


# File name → what draws it, or returns None where there is nothing to draw.
FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "ratios": ratios,
    "batch": batch,
    "depth": depth,
    "memory": memory,
    "linear": linear,
}
