"""Tables as files: numbers with the names of their columns, read from and written to CSV, Parquet and .npy."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from glf_fast.data.arrays import read_arrays
from glf_fast.data.tables import Choose, NotNumbersError, Table, every_column, read_csv, read_parquet
from glf_fast.errors import UserError, did_you_mean
from glf_fast.files import atomic_write

__all__ = ["FORMATS", "as_csv", "indices_of", "names_of", "place", "read", "write"]

FORMATS = (".csv", ".parquet", ".npy")
# What CSV files have in place of a number that is missing.
MISSING = frozenset({"", "nan", "na", "n/a", "null", "none", "?"})


def names_of(names: Sequence[str], width: int) -> tuple[str, ...]:
    """Names of columns: 1, 2, 3 … if there are none."""
    return tuple(names) or tuple(str(i + 1) for i in range(width))


def indices_of(where: str, wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Places of columns among all names; raises UserError for a name that is not there, or there twice."""
    for name in wanted:
        if name not in names:
            hint = did_you_mean(name, names) or f"its columns are {', '.join(names)}"
            raise UserError(f"{where} has no column {name!r}; {hint.rstrip()}")
        if names.count(name) > 1:
            raise UserError(f"{where} has {names.count(name)} columns called {name!r}; give them different names")
    return [names.index(name) for name in wanted]


def read(path: Path, choose: Choose = every_column) -> Table:
    """The numbers of a file in float64, with a name for each column; NaN where they are missing.

    Raises:
        UserError: a file of another format, or that is damaged; a chosen column that is not numeric or holds an infinity.
    """
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"{path} is not a table; tables are {', '.join(FORMATS)} files")
    try:
        table = {".csv": _csv, ".parquet": _parquet, ".npy": _npy}[kind](path, choose)
    except NotNumbersError as error:
        names = names_of(error.names, 1 + max(error.columns))
        rest = " ".join(_quoted(name) for i, name in enumerate(names) if i not in error.columns)
        remedy = (
            f"; --columns chooses the columns to read{f', such as --columns {rest}' if error.names and rest else ''}"
        )
        raise UserError(f"{error}{remedy}") from None
    values = table.values.astype(np.float64)
    infinite = np.argwhere(np.isinf(values))
    table = replace(table, values=values, columns=names_of(table.columns, values.shape[1]))
    if len(infinite):
        row, column = infinite[0]
        raise UserError(
            f"{path}, {place(table, row)}: column {table.columns[column]!r} is {values[row, column]} ({len(infinite)} such "
            "value(s)); remove these rows"
        )
    return table


def place(table: Table, row: int) -> str:
    """Where a row is in its file."""
    return f"line {table.lines[row]}" if len(table.lines) else f"row {row}"


def write(path: Path, names: Sequence[str], values: np.ndarray) -> None:
    """Write values (N, D), atomically, in the format of the path's suffix."""
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"--out {path} is not the name of a table; tables are {', '.join(FORMATS)} files")
    with atomic_write(path) as temporary:
        if kind == ".npy":
            np.save(temporary, values)
        elif kind == ".csv":
            temporary.write_text(as_csv(names, values), encoding="utf-8")
        else:
            _write_parquet(temporary, names, values)


def as_csv(names: Sequence[str], values: np.ndarray) -> str:
    """The text of a CSV file, whose numbers are read back bit for bit."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([["" if value != value else repr(value) for value in row] for row in values.tolist()])
    return buffer.getvalue()


def _csv(path: Path, choose: Choose) -> Table:
    return read_csv(path, choose, MISSING)


def _parquet(path: Path, choose: Choose) -> Table:
    return read_parquet(path, choose, nulls=True)


def _npy(path: Path, choose: Choose) -> Table:
    [array] = read_arrays(path).values()
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"{path} has shape {array.shape}; a table is an array (rows, columns) of at least one row")
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path} holds {array.dtype}; the values of a table must be real numbers")
    return Table(str(path), array[:, list(choose((), array.shape[1]))])


def _write_parquet(path: Path, names: Sequence[str], values: np.ndarray) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet files are written by pyarrow: pip install "glf_fast[parquet]"') from error
    parquet.write_table(
        pyarrow.Table.from_arrays([pyarrow.array(column) for column in values.T], names=list(names)), path
    )


def _quoted(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() else f"'{name}'"
