"""The user's tables: rows of numbers from CSV and Parquet files, as float32."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import TableDataset, split_off_test
from glf_fast.errors import UserError

__all__ = [
    "Choose",
    "NotNumbersError",
    "Table",
    "every_column",
    "load_csv",
    "load_parquet",
    "read_csv",
    "read_parquet",
    "rows_from",
]

POLICY = "test: a tenth of a fixed random order"
REMEDY = "drop these rows or fill the values in"


def rows_from(where: str, table: np.ndarray, lines: Sequence[int] = (), columns: Sequence[str] = ()) -> Tensor:
    """A numeric array (N, D) as float32 rows. NaN, infinities and numbers beyond float32 are errors, never replaced.

    Args:
        where: name of the file and of the array in it, for messages.
        lines: line of each row in the file, for messages; by default rows are counted from 0.
        columns: names of the columns, for messages.

    Raises:
        UserError: an array that is not numeric, or a value that is not finite in float32; the message has the place of the
            value.
    """
    if table.dtype.kind not in "fiub":
        raise UserError(f"{where} holds {table.dtype}; rows of a table must be real numbers")
    with np.errstate(over="ignore"):  # reported below, with the place
        rows = table.astype(np.float32, order="C")
    wrong = np.argwhere(~np.isfinite(rows))
    if len(wrong):
        row, column = wrong[0]
        place = f"line {lines[row]}" if len(lines) else f"row {row}"
        value = table[row, column]
        reason = "too large for float32" if np.isfinite(value) else "not a finite number"
        raise UserError(
            f"{where}, {place}: {_column(column, columns)} is {value}, {reason} ({len(wrong)} such value(s)); {REMEDY}"
        )
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class Table:
    """The numbers of a file, as they are.

    Attributes:
        where: path of the file, for messages.
        values: (N, D); NaN where a value is missing, if the reader was asked to let these pass.
        columns: the D names, or () if the file has none.
        lines: line of each row in a text file, else ().
    """

    where: str
    values: np.ndarray
    columns: tuple[str, ...] = ()
    lines: Sequence[int] = ()


class NotNumbersError(UserError):
    """Columns without numbers; `columns` has their indices among all columns of the file, `names` the names of all."""

    def __init__(self, message: str, columns: Sequence[int], names: Sequence[str]) -> None:
        super().__init__(message)
        self.columns, self.names = tuple(columns), tuple(names)


# From the names of a file's columns, () if it has none, and their number: indices of those to read, in order.
Choose = Callable[[tuple[str, ...], int], Sequence[int]]


def every_column(names: tuple[str, ...], width: int) -> Sequence[int]:
    """The choice of all columns."""
    return range(width)


def load_csv(path: Path, split: str) -> TableDataset:
    """A split of the rows of a CSV file, see `read_csv`. A tenth of a fixed random order is the test split."""
    return _split(path, read_csv(path), split)


def load_parquet(path: Path, split: str) -> TableDataset:
    """A split of the rows of a Parquet file, see `read_parquet`. A tenth of a fixed random order is the test split."""
    return _split(path, read_parquet(path), split)


def read_csv(path: Path, choose: Choose = every_column, missing: Collection[str] = ()) -> Table:
    """The numbers of a CSV file: commas, UTF-8, the same number of values in each row, one header line or none.

    The first line is a header if none of its values is a number. Blank lines are ignored, but one between the rows
    of a single column is a missing value, as pandas and R write it.

    Args:
        choose: which columns to read. The others may hold anything.
        missing: words, in lower case, that stand for a missing value.

    Raises:
        UserError: an empty file; a value that is missing or not a number; a row of another length; a first line that may be a
            header or a row. The message names the line.
    """
    columns: list[str] = []
    values, lines, width = array("d"), array("q"), 0
    chosen: Sequence[int] = ()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for line, row in _filled(reader):
                if not width:
                    width = len(row)
                    columns = _header(path, line, row)
                    chosen = choose(tuple(columns), width)
                    if columns:
                        continue
                if len(row) != width:
                    raise UserError(
                        f"{path}, line {line} has {len(row)} value(s), but the first line has {width}; "
                        "separate values by commas, and quote text that contains a comma"
                    )
                if (numbers := _numbers([row[i] for i in chosen], missing)) is None:
                    raise _not_a_number(path, line, row, columns, chosen, missing)
                values.extend(numbers)
                lines.append(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error})") from error
    if not lines:
        raise UserError(
            f"{path} {'has a header but no rows' if width else 'is empty'}; a table needs at least two rows"
        )
    names = tuple(columns[i] for i in chosen) if columns else ()
    return Table(str(path), np.frombuffer(values).reshape(len(lines), len(chosen)), names, lines)


def read_parquet(path: Path, choose: Choose = every_column, *, nulls: bool = False) -> Table:
    """The numbers of a Parquet file. Columns that pandas wrote as the index of a frame are none of its columns.

    Args:
        choose: which columns to read. The others may be of any type.
        nulls: let missing values pass, as NaN.

    Raises:
        UserError: pyarrow is not installed; a column that is not numeric; missing values; a damaged file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError('Parquet files are read by pyarrow: pip install "glf_fast[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
        index = (table.schema.pandas_metadata or {}).get("index_columns", [])
        table = table.select([i for i, name in enumerate(table.column_names) if name not in index])
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a Parquet file ({error}); write it again") from error
    if not table.num_rows or not table.num_columns:
        raise UserError(
            f"{path} has {table.num_rows} rows and {table.num_columns} columns; a table needs rows and columns"
        )
    kinds, names, arrays = pyarrow.types, table.column_names, []
    chosen = choose(tuple(names), len(names))
    numeric = (kinds.is_floating, kinds.is_integer, kinds.is_boolean)
    if wrong := [i for i in chosen if not any(check(table.column(i).type) for check in numeric)]:
        raise NotNumbersError(
            f"{path}: column {names[wrong[0]]!r} holds {table.column(wrong[0]).type}, not numbers; remove it or encode it "
            "as numbers",
            wrong,
            names,
        )
    for i in chosen:
        column = table.column(i)
        if column.null_count and not nulls:
            raise UserError(f"{path}: column {names[i]!r} has {column.null_count} missing value(s); {REMEDY}")
        # Booleans with nulls would become Python objects.
        arrays.append((column.cast("int8") if kinds.is_boolean(column.type) and nulls else column).to_numpy())
    return Table(str(path), np.column_stack(arrays), tuple(names[i] for i in chosen))


def _split(path: Path, table: Table, split: str) -> TableDataset:
    rows = rows_from(str(path), table.values, table.lines, table.columns)
    rows, _ = split_off_test(str(path), rows, None, split)
    return TableDataset.of(str(path), split, rows, None, POLICY, table.columns)


def _numbers(row: Sequence[str], missing: Collection[str] = ()) -> list[float] | None:
    """The values of a row, or None if one of them is neither a number nor missing."""
    if "_" in "".join(row):  # Python reads 2020_01 as 202001
        return None
    try:
        return [float(text) for text in row]
    except ValueError:
        filled = ["nan" if text.strip().lower() in missing else text for text in row] if missing else row
        return None if filled == row else _numbers(filled)


def _filled(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv.reader that are not blank, and their lines; of a single column also the blank ones between them."""
    width, blank = 0, array("q")
    for row in reader:
        if not row:
            blank.append(reader.line_num)
            continue
        if width == 1:
            yield from ((line, [""]) for line in blank)
        width, blank = width or len(row), array("q")
        yield reader.line_num, row


def _header(path: Path, line: int, row: list[str]) -> list[str]:
    """Column names of the first line, or [] if the line is a row of numbers; raises UserError if the line may be either."""
    names = [name.strip() for name in row]
    if len(row) > 2 and names == [str(i) for i in range(len(row))]:
        raise UserError(
            f"{path}, line {line} counts 0, 1, 2 …, which looks like the column numbers that pandas writes; remove this line "
            "(in pandas: to_csv(header=False, index=False))"
        )
    if _numbers(row) is not None:
        return []
    if "" in names:
        raise UserError(
            f"{path}, line {line}: column {names.index('') + 1} has no name; name the column, or remove it if it counts the "
            "rows (in pandas: to_csv(index=False))"
        )
    numbers = [name for name in names if _numbers([name])]
    if numbers:
        text = next(name for name in names if name not in numbers)
        raise UserError(
            f"{path}, line {line} holds numbers and text ({numbers[0]!r}, {text!r} …), so it is neither a row nor a header; "
            "correct the row, or give every column a name that is not a number"
        )
    return names


def _not_a_number(
    path: Path, line: int, row: list[str], columns: Sequence[str], chosen: Sequence[int], missing: Collection[str]
) -> UserError:
    wrong = [i for i in chosen if _numbers([row[i]], missing) is None]
    text = row[wrong[0]].strip()
    where = f"{path}, line {line}: {_column(wrong[0], columns)}"
    if not text:
        return UserError(f"{where} is empty; missing values are not allowed: {REMEDY}")
    if len(row) == 1 and (mark := next((mark for mark in ";\t|" if mark in text), "")):
        return UserError(f"{path}, line {line} separates values by {mark!r}; separate them by commas")
    return NotNumbersError(
        f"{where} is {text!r}, not a number; remove the column or encode it as numbers", wrong, columns
    )


def _column(index: int, columns: Sequence[str]) -> str:
    return f"column {columns[index]!r}" if columns else f"column {index + 1}"
