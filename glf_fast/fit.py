"""python -m glf_fast.fit TABLE: a density of the rows of a table; python -m glf_fast.fit FOLDER: its scores and samples.

The function `glf_fast.fit` is another thing: it is in glf_fast/fitting, and remains `glf_fast.fit`, see the end of this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from glf_fast import distributed
from glf_fast.command_line import parse, pick_device
from glf_fast.data.tables import Table
from glf_fast.errors import UserError, check_text, run_command
from glf_fast.fitting import fit
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.tabular import TableDensity, files
from glf_fast.tabular.columns import far
from glf_fast.tabular.preparation import Options
from glf_fast.tabular.run import Training, fit_table


@dataclass(frozen=True)
class Fit:
    """Fit a density to the rows of a table, and write it with a report. The same command resumes an interrupted run.

    python -m glf_fast.fit FOLDER --help explains how to score and to sample rows with it.
    """

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """A .csv, .parquet or .npy file of numbers; or the folder of a density, to score and to sample rows."""
    out: Path | None = None
    """Folder for the density and its report; by default densities/ and the table's name."""
    columns: tuple[str, ...] = ()
    """Columns to have a density; by default all that are not --context. Columns without names are called 1, 2, 3 …"""
    context: tuple[str, ...] = ()
    """Columns that the density is conditioned on: p(columns | context)."""
    bounds: tuple[str, ...] = ()
    """Bounds of columns, COLUMN=LOW:HIGH, such as share=0:1 or income=0: (no upper bound)."""
    dequantise: tuple[str, ...] = ()
    """Discrete columns, such as ages in years: noise as wide as a step is added to them; samples are rounded."""
    drop_missing: bool = False
    """Leave out rows with missing values, instead of refusing the table."""
    epochs: int | None = None
    """Passes over the rows at most; by default as many as make 5,000 steps, and at least 50."""
    batch_size: int | None = None
    """Rows of a step; by default an eighth of the training rows, at most 256."""
    lr: float = 1e-3
    """Learning rate at the start; it falls to 0 along half a cosine."""
    patience: int | None = None
    """Stop after this many epochs without a better validation loss; by default a fifth of all epochs, at least 10."""
    seed: int = 0
    """Random seed: division into training, validation and test rows, initial weights, order of rows, noise and samples."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""
    flow: FlowSettings = field(default_factory=lambda: FlowSettings(coupling="spline"))


@dataclass(frozen=True)
class Use:
    """Score the rows of a table, or draw new rows, with a density that python -m glf_fast.fit TABLE has fitted."""

    density: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the density."""
    score: Path | None = None
    """A table whose rows get a score each: log p(row) in nats, in the units of the table."""
    sample: int | None = None
    """Number of rows to draw; with --context-from, for each row of contexts."""
    context_from: Path | None = None
    """A table with the context columns, for --sample with a conditional density."""
    out: Path | None = None
    """A .csv, .parquet or .npy file to write; by default CSV is printed."""
    drop_missing: bool = False
    """For --score: give rows with missing values no score, instead of refusing the table."""
    seed: int = 0
    """Random seed of samples."""
    device: str = ""
    """Device: cpu, cuda, cuda:1, …; by default cuda if there is a GPU."""


def main() -> None:
    """Run the command."""
    distributed.refuse_several()
    arguments = sys.argv[1:]
    of_use = ("--score", "--sample", "--context-from")
    if any(word.split("=")[0].replace("_", "-") in of_use for word in arguments) or (
        arguments and Path(arguments[0]).is_dir()
    ):
        _use(parse(Use, arguments, "glf_fast.fit"))
    else:
        _fit(parse(Fit, arguments, "glf_fast.fit"))


def _fit(command: Fit) -> None:
    folder = command.out or Path("densities") / command.table.stem
    for path in (folder, folder.resolve().name):
        check_text("--out", str(path))
    _check_numbers(command)
    evaluation, result = fit_table(
        command.table,
        folder,
        Options(command.columns, command.context, command.bounds, command.dequantise, command.drop_missing),
        command.flow,
        Training(command.epochs, command.batch_size, command.lr, command.patience, command.seed),
        pick_device(command.device),
        lambda note: print(note, file=sys.stderr),
    )
    print(f"log-likelihood in nats per row, after {result.steps:,} steps in {result.seconds:.1f} s\n")
    print(f"{'':10}{'train':>12}{'validation':>12}{'test':>12}")
    for name, found in evaluation.likelihoods.items():
        print(f"{name:10}" + "".join(f" {_short(likelihood.mean):>11}" for likelihood in found.values()))
    if evaluation.likelihoods["flow"]["test"].mean < evaluation.likelihoods["gaussian"]["test"].mean:
        print("\nThe flow is no better than a normal distribution on the test rows; more rows would help.")
    print(f"\ndensity   {folder}\nreport    {folder / 'report.html'}")


def _short(number: float) -> str:
    return f"{number:.3f}" if abs(number) < 1e7 else f"{number:.6g}"


def _check_numbers(command: Fit) -> None:
    """Raise UserError for options out of their ranges."""
    for name in ("epochs", "batch_size", "patience"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 < command.lr < float("inf"):
        raise UserError(f"--lr {command.lr} must be positive and finite")


def _use(command: Use) -> None:
    density = TableDensity.load(command.density)
    density.flow.to(pick_device(command.device))
    if (command.score is None) == (command.sample is None):
        raise UserError("give either --score TABLE or --sample N")
    if command.score is not None:
        names, values = ["log_prob"], _scores(command, density)[:, None]
    else:
        names, values = _samples(command, density)
    if command.out is None:
        print(files.as_csv(names, values), end="")
    else:
        files.write(command.out, names, values)
        print(f"wrote {len(values):,} rows to {command.out}", file=sys.stderr)


def _scores(command: Use, density: TableDensity) -> np.ndarray:
    """log p of each row; NaN for rows with missing values."""
    assert command.score is not None
    if command.context_from:
        raise UserError("--context-from is for --sample; the table of --score holds the context columns itself")
    _, (values, given) = _read(command.score, density, density.columns, density.context)
    missing = np.isnan(values).any(1) | np.isnan(given).any(1)
    if missing.any():
        text = f"{missing.sum()} of {len(missing)} rows of {command.score} have missing values"
        if not command.drop_missing:
            raise UserError(f"{text}; fill them in, or leave their scores empty with --drop-missing")
        print(f"{text}, and no score", file=sys.stderr)
    scores = np.full(len(values), np.nan)
    scores[~missing] = density.log_prob(values[~missing], given[~missing] if density.context else None)
    if n := int(np.isneginf(scores).sum()):
        print(
            f"{n} rows have the score -inf: a value is on or beyond its bounds, or far from all others", file=sys.stderr
        )
    return scores


def _samples(command: Use, density: TableDensity) -> tuple[list[str], np.ndarray]:
    """Rows with the context columns in front, and their names."""
    n = command.sample or 0
    if n < 1:
        raise UserError(f"--sample {n} must be at least 1")
    if bool(density.context) != (command.context_from is not None):
        names = ", ".join(column.name for column in density.context)
        raise UserError(
            f"this density is conditional: give a table with the columns {names} as --context-from"
            if names
            else "this density has no context columns; leave out --context-from"
        )
    given = np.empty((0, 0))
    if command.context_from:
        table, (given,) = _read(command.context_from, density, density.context)
        if np.isnan(given).any():
            raise UserError(f"{command.context_from} has missing values; fill them in")
        for i, column in enumerate(density.context):
            if len(rows := np.flatnonzero(far(column, given[:, i]))):
                raise UserError(
                    f"{command.context_from}, {files.place(table, int(rows[0]))}: column {column.name!r} is "
                    f"{given[rows[0], i]:g}, too far from the rows that the density was fitted to; remove this row"
                )
    total = n * (len(given) if density.context else 1)
    if total * len(density.table) >= 2**60:  # bytes that torch and numpy can count
        raise UserError(f"--sample {n}: these are more rows than any memory holds; draw fewer")
    given = np.repeat(given, n, 0) if density.context else np.empty((n, 0))
    values = density.sample(total, given if density.context else None, seed=command.seed)
    return [column.name for column in (*density.context, *density.columns)], np.concatenate([given, values], 1)


def _read(path: Path, density: TableDensity, *parts: Sequence[Any]) -> tuple[Table, list[np.ndarray]]:
    """A file, and its values of these columns: by name, or by place where the file has no names."""
    wanted = [column.name for part in parts for column in part]

    def choose(names: tuple[str, ...], width: int) -> Sequence[int]:
        if names:
            return files.indices_of(str(path), wanted, names)
        for order in (density.table, [name for name in density.table if name in wanted]):
            if width == len(order):
                return [order.index(name) for name in wanted]
        raise UserError(
            f"{path} has {width} columns without names; give {len(wanted)} of them, {', '.join(wanted)}, or all "
            f"{len(density.table)} of the table that the density was fitted to"
        )

    table: Table = files.read(path, choose)
    widths = np.cumsum([len(part) for part in parts])[:-1]
    return table, np.split(table.values, widths, axis=1)


if __name__ == "__main__":
    run_command(main)
else:
    # `import glf_fast.fit` ends by setting the package's attribute `fit` to what sys.modules has under this name. With the
    # module in its place, `glf_fast.fit(flow, x)` would fail from then on.
    sys.modules[__name__] = fit  # type: ignore[assignment]
