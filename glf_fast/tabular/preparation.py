"""Preparation of a table for its density: the rows of a table that have all values, in columns that have a density."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from glf_fast import seeds
from glf_fast.data.tables import Table
from glf_fast.errors import UserError
from glf_fast.tabular import files
from glf_fast.tabular.columns import Column, encoded, far

__all__ = ["Options", "Prepared", "prepare"]

FEWEST = 20  # rows, of which 2 are for validation and 2 for the test
# Rows with the same value, from which a column is no sample of a density: this share of all rows, and as many.
SHARE, TIES = 0.02, 5


@dataclass(frozen=True)
class Options:
    """Options of the user for a table.

    Attributes:
        columns: columns to have a density; () for all that are not in `context`.
        context: columns that the density is conditioned on.
        bounds: "COLUMN=LOW:HIGH", where one of the two numbers may be missing.
        dequantise: discrete columns, to which noise is added.
        drop_missing: leave out rows with missing values.
    """

    columns: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()
    dequantise: tuple[str, ...] = ()
    drop_missing: bool = False


@dataclass(frozen=True)
class Prepared:
    """The rows of a table, divided at random.

    Attributes:
        columns, context: the columns, with the maps that standardise the training rows.
        values: (N, D), with the noise of discrete columns. given: (N, C).
        splits: indices of the rows for "train" (eight tenths), "validation" and "test".
        table: names of all columns of the file.
        notes: what a user should know, in sentences.
    """

    columns: tuple[Column, ...]
    context: tuple[Column, ...]
    values: np.ndarray
    given: np.ndarray
    splits: Mapping[str, np.ndarray]
    table: tuple[str, ...]
    notes: tuple[str, ...]

    def rows(self, split: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Values and context of the rows of a split."""
        index = self.splits[split]
        return self.values[index], self.given[index] if self.context else None


def prepare(path: Path, options: Options, seed: int) -> Prepared:
    """The rows of a file.

    Raises:
        UserError: names of columns that are not there; missing values; too few rows; values beyond their bounds.
    """
    table, every = _read(path, options)
    table, notes = _complete(table, options.drop_missing)
    if (n := len(table.values)) < FEWEST:
        raise UserError(f"{path} has {n} row(s); a density needs at least {FEWEST}, and better a thousand")
    splits, bounds = _splits(n, seed), _bounds(table, options)
    repeated: list[str] = []
    columns: dict[str, list[Column]] = {"columns": [], "context": []}
    kept: dict[str, list[np.ndarray]] = {"columns": [], "context": []}
    for i, name in enumerate(table.columns):
        x, role = table.values[:, i], "context" if name in options.context else "columns"
        trained = x[splits["train"]]
        if (trained == trained[0]).all():
            notes.append(f"Column {name!r} is constant ({trained[0]:g}) in the training rows; it is left out.")
            continue
        low, high = bounds.get(name, (None, None))
        column = Column(name, low=low, high=high)
        if name in options.dequantise:
            column, x = _with_noise(path, column, x, seed)
        elif role == "columns":
            repeated += _repeated(name, x)
        columns[role].append(_standardised(table, column, x, splits["train"]))
        kept[role].append(x)
    if repeated:
        notes.append(
            f"Values are repeated in {', '.join(repeated)}: the density of such values has no bound, so likelihoods with these "
            "columns mean little. --dequantise adds noise to columns of steps; --context conditions on columns."
        )
    if not columns["columns"]:
        raise UserError(f"{path}: no column is left that is not constant; a constant has no density")
    found = [np.stack(part, 1) if part else np.empty((n, 0)) for part in kept.values()]
    notes += _collinear([*columns["columns"], *columns["context"]], np.concatenate(found, 1)[splits["train"]])
    return Prepared(
        tuple(columns["columns"]), tuple(columns["context"]), found[0], found[1], splits, every, tuple(notes)
    )


def _read(path: Path, options: Options) -> tuple[Table, tuple[str, ...]]:
    """The columns that the options name, in the order of the file, and the names of all its columns."""
    every: tuple[str, ...] = ()

    def choose(names: tuple[str, ...], width: int) -> Sequence[int]:
        nonlocal every
        every = files.names_of(names, width)
        wanted = (*options.columns, *options.context) if options.columns else every
        if both := set(options.columns) & set(options.context):
            raise UserError(f"--columns and --context both name {sorted(both)[0]!r}; a column is one or the other")
        files.indices_of(str(path), options.context, every)
        return sorted(set(files.indices_of(str(path), wanted, every)))

    table = files.read(path, choose)
    if set(table.columns) == set(options.context):
        raise UserError(f"--context names all columns of {path}; leave out those that are to have a density")
    return table, every


def _complete(table: Table, drop: bool) -> tuple[Table, list[str]]:
    """The rows without missing values, and notes."""
    missing = np.isnan(table.values)
    incomplete = missing.any(1)
    if not incomplete.any():
        return table, []
    counts = ", ".join(f"{name}: {n}" for name, n in zip(table.columns, missing.sum(0), strict=True) if n)
    text = f"{incomplete.sum()} of {len(incomplete)} rows have missing values ({counts})"
    if not drop:
        raise UserError(
            f"{table.where}: {text}; fill them in, choose other --columns, or leave these rows out with --drop-missing"
        )
    lines = [line for line, gone in zip(table.lines, incomplete, strict=False) if not gone]
    rest = Table(table.where, table.values[~incomplete], table.columns, lines)
    return rest, [f"{text[0].upper()}{text[1:]}; these rows are left out."]


def _splits(n: int, seed: int) -> dict[str, np.ndarray]:
    order = torch.randperm(n, generator=seeds.generator(seed, "split")).numpy()
    tenth = -(-n // 10)
    return {"train": order[2 * tenth :], "validation": order[tenth : 2 * tenth], "test": order[:tenth]}


def _bounds(table: Table, options: Options) -> dict[str, tuple[float | None, float | None]]:
    """The bounds of columns by name; also checks that these and the discrete columns are columns that have a density."""
    bounds = dict(_bound(text) for text in options.bounds)
    own = [name for name in table.columns if name not in options.context]
    for option, named in (("--bounds", bounds), ("--dequantise", options.dequantise)):
        if unknown := [name for name in named if name not in own]:
            raise UserError(f"{option} names {unknown[0]!r}, but the columns that have a density are {', '.join(own)}")
    return bounds


def _bound(text: str) -> tuple[str, tuple[float | None, float | None]]:
    name, _, numbers = text.rpartition("=")
    found = re.fullmatch(r"([^:]*):([^:]*)", numbers)
    try:
        assert name and found and numbers != ":"
        low, high = (float(part) if part.strip() else None for part in found.groups())
        assert all(bound is None or np.isfinite(bound) for bound in (low, high))
        assert low is None or high is None or low < high
    except (AssertionError, ValueError):
        raise UserError(
            f"--bounds {text!r} must be COLUMN=LOW:HIGH, with LOW < HIGH, such as share=0:1, or income=0: for no upper bound"
        ) from None
    return name, (low, high)


def _with_noise(path: Path, column: Column, x: np.ndarray, seed: int) -> tuple[Column, np.ndarray]:
    """A discrete column as a continuous one: uniform noise fills the distance between its values."""
    different = np.unique(x)
    step = float(np.diff(different).min())
    multiples = (different - different[0]) / step
    if np.abs(multiples - np.round(multiples)).max() > 1e-3:
        raise UserError(
            f"--dequantise {column.name}: its values in {path} are not a multiple of one step apart (the smallest distance is "
            f"{step:g}); round them first"
        )
    noise = torch.rand(len(x), dtype=torch.float64, generator=seeds.generator(seed, "dequantise", column.name)).numpy()
    found = Column(column.name, low=column.low, high=column.high, step=step, origin=float(different[0]))
    return found, x + step * (noise - 0.5)


def _standardised(table: Table, column: Column, x: np.ndarray, train: np.ndarray) -> Column:
    outside = np.flatnonzero(~column.inside(x))
    if len(outside):
        low, high = ("" if bound is None else f"{bound:g}" for bound in (column.low, column.high))
        noisy = " with its noise" if column.step else ""
        raise UserError(
            f"{table.where}: column {column.name!r}{noisy} is on or beyond its bounds {low}:{high} in {len(outside)} row(s), "
            f"the first {files.place(table, int(outside[0]))}, where it is {x[outside[0]]:g}; give wider --bounds"
            f"{_wider(column, x) if column.step else ''}"
        )
    y, _ = column.unbounded(x[train])
    scale = np.abs(y).max()  # the squares of huge numbers would be infinite
    with np.errstate(under="ignore"):
        mean, std = float(scale * np.mean(y / scale)), float(scale * np.std(y / scale))
    if not std > 0:
        raise UserError(f"{table.where}: the values of column {column.name!r} are too close together; rescale them")
    found = Column(column.name, mean, std, column.low, column.high, column.step, column.origin)
    if len(distant := np.flatnonzero(far(found, x))):
        places = ", ".join(f"{files.place(table, int(row))} ({x[row]:g})" for row in distant[:5])
        raise UserError(
            f"{table.where}: column {column.name!r} is too far from the training rows for float32 in {len(distant)} "
            f"row(s): {places}{', …' if len(distant) > 5 else ''}; remove these rows, or give --bounds if it spans many "
            "orders of magnitude"
        )
    return found


def _wider(column: Column, x: np.ndarray) -> str:
    """Bounds that a discrete column with its noise is between: half a step beyond its values."""
    half, last = column.step / 2, float(column.origin + column.step * np.round((x.max() - column.origin) / column.step))
    low = "" if column.low is None else f"{min(column.low, column.origin - half):.12g}"
    high = "" if column.high is None else f"{max(column.high, last + half):.12g}"
    return f", such as {column.name}={low}:{high}, half a step beyond the values"


def _repeated(name: str, x: np.ndarray) -> list[str]:
    """The column and its most frequent value, if that is too frequent for a sample of a density."""
    different, counts = np.unique(x, return_counts=True)
    most = int(counts.argmax())
    few = counts[most] < max(TIES, SHARE * len(x))
    return [] if few else [f"{name!r} ({different[most]:g} in {counts[most]} of {len(x)} rows)"]


def _collinear(columns: Sequence[Column], values: np.ndarray) -> list[str]:
    if len(values) <= len(columns):
        return [f"{len(values)} training rows are too few for {len(columns)} columns: the density means little."]
    z, _ = encoded(columns, values)
    variances, directions = np.linalg.eigh(
        np.cov(z.astype(np.float64), rowvar=False).reshape(len(columns), len(columns))
    )
    if variances[0] > 1e-8:
        return []
    names = ", ".join(repr(c.name) for c, part in zip(columns, directions[:, 0], strict=True) if abs(part) > 0.05)
    return [f"Columns {names} determine each other linearly: their density has no bound. Leave one of them out."]
