"""report.html of a density of a table: likelihoods, calibration, data beside samples, losses and seconds on one page."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glf_fast import page
from glf_fast.fitting import FitResult
from glf_fast.tabular import calibration
from glf_fast.tabular.density import TableDensity
from glf_fast.tabular.evaluation import Evaluation
from glf_fast.tabular.preparation import Prepared

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write"]

TITLES = {"flow": "flow", "gaussian": "normal distribution", "kde": "kernel density estimate"}
PAIRS, POINTS = 6, 1000  # columns and rows of the pair plots
PANELS = 40  # columns whose calibration is drawn


def write(
    path: Path, source: str, density: TableDensity, prepared: Prepared, evaluation: Evaluation, result: FitResult,
    record: Mapping[str, Any], seed: int,
) -> None:  # fmt: skip
    """Write the page; `record` is what result.json holds."""
    names = [column.name for column in density.columns]
    given = f" given {', '.join(column.name for column in density.context)}" if density.context else ""
    rows = {split: len(index) for split, index in prepared.splits.items()}
    subtitle = (
        f"The density of {', '.join(names)}{given} in {source}: {sum(rows.values()):,} rows, of which {rows['validation']:,} "
        f"are for validation and {rows['test']:,} for the test."
    )
    order = np.argsort([-calibration.distance(u) for u in evaluation.transforms[:, 1:].T], kind="stable")
    with page.style():
        body = (
            f'<div class="top"><div class="card">{_likelihoods(evaluation)}</div>'
            f'<div class="card">{_notes(record["notes"])}{_seconds(record["seconds"], result)}</div></div>'
            + _calibration(evaluation.transforms, names, order)
            + _pairs(density, prepared, sorted(order[:PAIRS].tolist()), seed)
            + _losses(evaluation, result)
            + _columns(density)
        )
    settings = html.escape(json.dumps(record, indent=2, ensure_ascii=False))
    body += f'<h2>All numbers</h2><details class="card"><summary>result.json</summary><pre>{settings}</pre></details>'
    page.write(path, path.resolve().parent.name, subtitle, body)


def _likelihoods(evaluation: Evaluation) -> str:
    best = evaluation.likelihoods["flow"]["test"]
    rows = "".join(
        f"<tr><td>{TITLES[name]}</td>"
        + "".join(f"<td>{found.mean:.3f} ± {found.error:.3f}</td>" for found in by_split.values())
        + "</tr>"
        for name, by_split in evaluation.likelihoods.items()
    )
    return (
        '<div class="label">log-likelihood of the test rows in nats per row, higher is better</div>'
        f'<div class="number">{best.mean:.3f}</div>'
        f"<table><tr><th></th><th>train</th><th>validation</th><th>test</th></tr>{rows}</table>"
        '<div class="label">Means and their standard errors, in the units of the table. A kernel density estimate scores its '
        f"own rows without the row itself; its bandwidth is {evaluation.bandwidth:g} times Silverman’s, the best on the "
        "validation rows.</div>"
    )


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f"<ul>{items}</ul>" if items else '<div class="label">Nothing is odd about this table.</div>'


def _seconds(seconds: Mapping[str, float], result: FitResult) -> str:
    listed = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return (
        f'<div class="label">{len(result.training_loss)} epochs, {result.steps:,} steps; the weights of epoch '
        f"{result.best_epoch} are the best on the validation rows. {html.escape(listed)}.</div>"
    )


def _section(title: str, text: str, figure: Figure) -> str:
    return f'<h2>{title}</h2><p>{html.escape(text)}</p><div class="card">{page.svg(figure)}</div>'


def _calibration(transforms: np.ndarray, names: Sequence[str], order: np.ndarray) -> str:
    n, bins = len(transforms), int(np.clip(len(transforms) // 20, 4, 20))
    low, high = calibration.band(n, bins)
    shown = [0, *(1 + np.sort(order[:PANELS]))]
    across = min(5, len(shown))
    down = -(-len(shown) // across)
    figure = page.figure(2 * across, 1.7 * down)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axis, index in zip(axes, shown, strict=False):
        u = transforms[:, index]
        axis.axhspan(low, high, color=page.GREY, alpha=0.25, linewidth=0)
        axis.hist(u, bins, range=(0, 1), color=page.BLUE if index else page.ORANGE, alpha=0.8)
        axis.set(title=_short(names[index - 1]) if index else "log p", ylim=(0, None), xticks=(0, 0.5, 1))
    for axis in list(axes)[len(shown) :]:
        axis.remove()
    text = (
        f"Ranks of {n:,} test rows among samples of the density, by column, and by log p in the first panel. The ranks of a "
        f"density that is right are uniform: in 95 of 100 such histograms all bars end within the grey band. A hump: the "
        "density is too wide; a bowl: too narrow; a slope: shifted."
    )
    if len(names) > PANELS:
        text += f" Shown are the {PANELS} of {len(names)} columns that are farthest from it."
    return _section("Calibration", text, figure)


def _pairs(density: TableDensity, prepared: Prepared, chosen: Sequence[int], seed: int) -> str:
    values, given = prepared.rows("test")
    values, given = values[:POINTS], None if given is None else given[:POINTS]
    samples = density.sample(len(values), given, seed=seed + 1, noisy=True)
    d, size = len(chosen), 3 if len(values) > 500 else 8
    figure = page.figure(*((10, 10) if d > 2 else (7, 7 if d > 1 else 3.5)))
    axes = figure.subplots(d, d, squeeze=False)
    both = np.concatenate([values, samples])
    limits = [np.quantile(both[np.isfinite(both[:, i]), i], [0.002, 0.998]) for i in chosen]
    for row, column in itertools.product(range(d), range(d)):
        axis, (i, j) = axes[row, column], (chosen[column], chosen[row])
        if column > row:
            axis.remove()
            continue
        for part, color, name in ((values, page.BLUE, "test rows"), (samples, page.ORANGE, "samples")):
            if row == column:
                axis.hist(
                    part[:, i], 30, range=tuple(limits[row]), density=True, histtype="step", color=color, label=name
                )
            else:
                axis.scatter(part[:, i], part[:, j], s=size, color=color, alpha=0.5, linewidths=0, rasterized=True)
        axis.set_xlim(*limits[column])
        axis.locator_params(nbins=3)
        if row != column:
            axis.set_ylim(*limits[row])
        else:
            axis.set_yticks([])
        if row == d - 1:
            axis.set_xlabel(_short(density.columns[i].name))
        if column == 0 and row:
            axis.set_ylabel(_short(density.columns[j].name))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right")
    text = f"{len(values):,} test rows and as many samples" + (
        ", each given a test row’s context." if density.context else "."
    )
    if len(density.columns) > d:
        text += f" Shown are the {d} of {len(density.columns)} columns that are calibrated worst."
    return _section("Data and samples", text, figure)


def _losses(evaluation: Evaluation, result: FitResult) -> str:
    figure = page.figure(10, 2.9)
    axis = figure.subplots()
    curves = {
        "training batches": (np.array(result.training_loss) - evaluation.shift["train"], page.GREY),
        "validation": (np.array(result.validation_loss) - evaluation.shift["validation"], page.BLUE),
    }
    for name, (loss, color) in curves.items():
        axis.plot(np.arange(1, len(loss) + 1), loss, label=name, color=color, linewidth=1.3)
    simple = -evaluation.likelihoods["gaussian"]["validation"].mean
    axis.axhline(simple, color=page.ORANGE, linewidth=1, linestyle="--", label="normal distribution, validation")
    axis.axvline(result.best_epoch, color=page.GREY, linewidth=0.7)
    late = np.concatenate([loss[len(loss) // 20 :] for loss, _ in curves.values()] + [[simple]])
    margin = 0.05 * float(np.ptp(late)) or 1.0
    axis.set(xlabel="epoch", ylabel="nats per row", ylim=(late.min() - margin, late.max() + margin))
    axis.grid(color=page.GREY, alpha=0.25, linewidth=0.5)
    axis.legend()
    text = "−log p in the units of the table. The vertical line is the epoch whose weights are kept."
    return _section("Losses", text, figure)


def _columns(density: TableDensity) -> str:
    rows = ""
    for role, columns in (("density", density.columns), ("context", density.context)):
        for c in columns:
            low, high = ("" if bound is None else f"{bound:g}" for bound in (c.low, c.high))
            bounds = f"{low}:{high}" if low or high else ""
            step = f"{c.step:g}" if c.step else ""
            cells = [html.escape(c.name), role, f"{c.mean:.6g}", f"{c.std:.6g}", bounds, step]
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("column", "role", "mean", "standard deviation", "bounds", "step"))
    text = "Means and deviations are those of the training rows, of the logits or logarithms of bounded columns."
    return f'<h2>Columns</h2><p>{text}</p><div class="card"><table><tr>{head}</tr>{rows}</table></div>'


def _short(name: str) -> str:
    return page.no_maths(name if len(name) <= 18 else f"{name[:17]}…")
