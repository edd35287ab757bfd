"""The user's tables: rows of numbers from CSV and Parquet files, as float32."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glf_fast.data.dataset import TableDataset, split_off_test
from glf_fast.errors import UserError

__all__ = ["load_csv", "load_parquet", "rows_from"]

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


def load_csv(path: Path, split: str) -> TableDataset:
    """A split of the rows of a CSV file: commas, UTF-8, the same number of values in each row, one header line or none.

    The first line is a header if none of its values is a number. Blank lines are ignored. A tenth of a fixed random order is
    the test split.

    Raises:
        UserError: an empty file; a value that is missing or not a number; a row of another length; a first line that may be a
            header or a row. The message names the line.
    """
    columns: list[str] = []
    values, lines, width = array("d"), array("q"), 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                if not row:
                    continue
                if not width:
                    width = len(row)
                    columns = _header(path, reader.line_num, row)
                    if columns:
                        continue
                if len(row) != width:
                    raise UserError(
                        f"{path}, line {reader.line_num} has {len(row)} value(s), but the first line has {width}; "
                        "separate values by commas, and quote text that contains a comma"
                    )
                if (numbers := _numbers(row)) is None:
                    raise _not_a_number(path, reader.line_num, row, columns)
                values.extend(numbers)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error})") from error
    if not lines:
        raise UserError(
            f"{path} {'has a header but no rows' if width else 'is empty'}; a table needs at least two rows"
        )
    rows = rows_from(str(path), np.frombuffer(values).reshape(-1, width), lines, columns)
    return _split(path, rows, columns, split)


def load_parquet(path: Path, split: str) -> TableDataset:
    """A split of the rows of a Parquet file with numeric columns. A tenth of a fixed random order is the test split.

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
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not a Parquet file ({error}); write it again") from error
    if not table.num_rows or not table.num_columns:
        raise UserError(
            f"{path} has {table.num_rows} rows and {table.num_columns} columns; a table needs rows and columns"
        )
    kinds = pyarrow.types
    for name, column in zip(table.column_names, table.columns, strict=True):
        if not (kinds.is_floating(column.type) or kinds.is_integer(column.type) or kinds.is_boolean(column.type)):
            raise UserError(
                f"{path}: column {name!r} holds {column.type}, not numbers; remove it or encode it as numbers"
            )
        if column.null_count:
            raise UserError(f"{path}: column {name!r} has {column.null_count} missing value(s); {REMEDY}")
    values = np.column_stack([column.to_numpy() for column in table.columns])
    rows = rows_from(str(path), values, columns=table.column_names)
    return _split(path, rows, table.column_names, split)


def _split(path: Path, rows: Tensor, columns: Sequence[str], split: str) -> TableDataset:
    rows, _ = split_off_test(str(path), rows, None, split)
    return TableDataset.of(str(path), split, rows, None, POLICY, columns)


def _numbers(row: Sequence[str]) -> list[float] | None:
    """The values of a row, or None if one of them is not a number."""
    if "_" in "".join(row):  # Python reads 2020_01 as 202001
        return None
    try:
        return [float(text) for text in row]
    except ValueError:
        return None


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


def _not_a_number(path: Path, line: int, row: list[str], columns: Sequence[str]) -> UserError:
    index = next(i for i, text in enumerate(row) if _numbers([text]) is None)
    text = row[index].strip()
    where = f"{path}, line {line}: {_column(index, columns)}"
    if not text:
        return UserError(f"{where} is empty; missing values are not allowed: {REMEDY}")
    return UserError(f"{where} is {text!r}, not a number; remove the column or encode it as numbers")


def _column(index: int, columns: Sequence[str]) -> str:
    return f"column {columns[index]!r}" if columns else f"column {index + 1}"
