"""Tables as users have them: what is read, in which columns, and how the rest is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from glf_fast.errors import UserError
from glf_fast.tabular import files
from glf_fast.tabular.columns import Column, decoded, encoded
from glf_fast.tabular.preparation import Options, Prepared, prepare

N = 60
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(N, 3))
HEADER = "a,b c,d"


def text(rows: np.ndarray, header: str = HEADER) -> str:
    return "\n".join([header] * bool(header) + [",".join(map(repr, row)) for row in rows.tolist()]) + "\n"


def prepared(tmp_path: Path, content: str, **options: object) -> Prepared:
    (tmp_path / "t.csv").write_text(content, encoding="utf-8")
    return prepare(tmp_path / "t.csv", Options(**options), seed=0)  # type: ignore[arg-type]


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    rows = np.concatenate([ROWS, [[1e300, -5e-324, np.nan]]])
    files.write(tmp_path / f"t{suffix}", ["a", "b", "c"], rows)
    table = files.read(tmp_path / f"t{suffix}")
    assert table.values.tobytes() == rows.tobytes() or np.array_equal(table.values, rows, equal_nan=True)
    assert table.columns == (("1", "2", "3") if suffix == ".npy" else ("a", "b", "c"))


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("\ufeff" + text(ROWS), ("a", "b c", "d")),
        (text(ROWS, ' a ,"b,c","d ""e"""'), ("a", "b,c", 'd "e"')),
        (text(ROWS, ""), ("1", "2", "3")),
        (text(ROWS).replace("\n", "\r\n"), ("a", "b c", "d")),
    ],
)
def test_odd_headers(tmp_path: Path, content: str, columns: tuple[str, ...]) -> None:
    found = prepared(tmp_path, content)
    assert found.table == columns == tuple(column.name for column in found.columns)
    np.testing.assert_array_equal(found.values, ROWS)


def test_columns_and_context_are_chosen_by_name_and_the_rest_may_be_text(tmp_path: Path) -> None:
    content = "city,a,b,c\n" + "".join(f"Ulm,{x},{y},{z}\n" for x, y, z in ROWS.tolist())
    found = prepared(tmp_path, content, columns=("c", "a"), context=("b",))
    assert [column.name for column in found.columns] == ["a", "c"] and found.context[0].name == "b"
    np.testing.assert_array_equal(found.values, ROWS[:, [0, 2]])
    np.testing.assert_array_equal(found.given, ROWS[:, [1]])
    assert prepared(tmp_path, text(ROWS), context=("d",)).values.shape == (N, 2)


# Content, options → what the message says.
REFUSED = {
    "text column": (
        "city,a\n" + "Ulm,1\n" * N, {}, r"line 2: column 'city' is 'Ulm', not a number.*--columns a$"),
    "semicolons": ("a\n" + "1;2\n" * N, {}, "separates values by ';'"),
    "missing": (text(ROWS).replace(repr(ROWS.tolist()[4][1]), "NA"), {}, r"1 of 60 rows .*\(b c: 1\).*--drop-missing"),
    "infinite": (text(ROWS).replace(repr(ROWS.tolist()[4][1]), "-inf"), {}, "line 6: column 'b c' is -inf"),
    "duplicate": (text(ROWS, "a,a,b"), {}, "2 columns called 'a'"),
    "unknown": (text(ROWS), {"columns": ("bc",)}, "no column 'bc'; did you mean 'b c'"),
    "both": (text(ROWS), {"columns": ("a", "d"), "context": ("a",)}, "both name 'a'"),
    "all context": (text(ROWS), {"context": ("a", "b c", "d")}, "names all columns"),
    "one row": (text(ROWS[:1]), {}, r"1 row\(s\); a density needs at least 20"),
    "no rows": (HEADER, {}, "no rows"),
    "constants": ("a,b\n" + "1,2\n" * N, {}, "no column is left"),
    "bounds form": (text(ROWS), {"bounds": ("a=1:0",)}, "must be COLUMN=LOW:HIGH"),
    "bounds of context": (text(ROWS), {"bounds": ("a=0:1",), "context": ("a",)}, "--bounds names 'a'"),
    "bounds violated": (text(ROWS), {"bounds": ("a=:0",)}, r"beyond its bounds :0 in \d+ row\(s\), the first line \d+"),
    "on a bound": (text(np.abs(ROWS).round()), {"bounds": ("a=0:9",)}, "on or beyond its bounds 0:9"),
    "noise beyond": (text(np.arange(3.0 * N).reshape(N, 3) % 7), {"dequantise": ("a",), "bounds": ("a=0:6",)},
        "such as a=-0.5:6.5, half a step"),
    "empty line": ("a\n1\n2\n\n" + "3\n4\n" * N, {}, r"1 of 123 rows have missing values \(a: 1\)"),
    "no steps": (text(ROWS), {"dequantise": ("a",)}, "not a multiple of one step"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_density_is_refused(tmp_path: Path, case: str) -> None:
    content, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        prepared(tmp_path, content, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("context", [(), ("b c",)])
@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("value", [1e20, -1e300])
def test_rows_far_from_the_training_rows_are_refused(
    tmp_path: Path, split: str, context: tuple[str, ...], value: float
) -> None:
    rows, row = ROWS.copy(), prepared(tmp_path, text(ROWS)).splits[split][0]
    rows[row, 1] = value
    with pytest.raises(
        UserError, match=rf"column 'b c' is too far .* in 1 row\(s\): line {row + 2} \(.*remove"
    ) as error:
        prepared(tmp_path, text(rows), context=context)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        ("t.npy", lambda path: np.save(path, np.zeros(5)), "has shape"),
        ("t.npy", lambda path: np.save(path, np.array([["a"]])), "must be real numbers"),
        ("t.npy", lambda path: np.save(path, np.array([[{}]]), allow_pickle=True), "pickled objects are never loaded"),
        ("t.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "cannot be read"),
        ("t.parquet", lambda path: path.write_bytes(b"PAR1"), "damaged"),
        ("t.parquet", lambda path: parquet.write_table(pyarrow.table({"a": ["x"], "b": [1]}), path), "--columns b$"),
        ("t.xlsx", lambda path: path.touch(), "not a table"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, save: object, message: str) -> None:
    save(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        files.read(tmp_path / name)


# -- columns --------------------------------------------------------------------------------------------------------------


def test_rows_with_missing_values_can_be_dropped(tmp_path: Path) -> None:
    columns = {name: pyarrow.array(ROWS[:, i], mask=np.arange(N) == 7 * i) for i, name in enumerate("ab")}
    columns["flag"] = pyarrow.array([i % 2 == 0 if i else None for i in range(N)])
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    found = prepare(tmp_path / "t.parquet", Options(drop_missing=True, context=("flag",)), seed=0)
    assert len(found.values) == N - 2 and "2 of 60 rows have missing values (a: 1, b: 1, flag: 1)" in found.notes[0]
    assert sorted(np.concatenate([*found.splits.values()])) == list(range(N - 2)), "each row is in one split"


def test_notes_name_constants_repeated_values_and_columns_that_determine_each_other(tmp_path: Path) -> None:
    rows = np.stack([np.full(N, 7.0), ROWS[:, 0].round(), ROWS[:, 1], 2 * ROWS[:, 1] + 3], 1)
    found = prepared(tmp_path, text(rows, "one,whole,x,y"))
    assert [column.name for column in found.columns] == ["whole", "x", "y"] and found.table[0] == "one"
    constant, ties, collinear = found.notes
    assert constant.startswith("Column 'one' is constant (7)") and "in 'whole' (0 in" in ties and "--dequantise" in ties
    assert collinear.startswith("Columns 'x', 'y' determine each other")
    assert prepared(tmp_path, text(ROWS)).notes == ()


def test_noise_of_discrete_columns_fills_their_steps(tmp_path: Path) -> None:
    rows = np.stack([RNG.integers(0, 5, N) * 0.1 + 3, ROWS[:, 0]], 1)
    found = prepared(tmp_path, text(rows, "a,b"), dequantise=("a",))
    column, noise = found.columns[0], found.values[:, 0] - rows[:, 0]
    assert column.step == pytest.approx(0.1) and np.abs(noise).max() <= 0.05 and noise.std() > 0.02 and not found.notes
    np.testing.assert_allclose(column.rounded(found.values[:, 0]), rows[:, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("column", "least", "most"),
    [
        (Column("n", low=-1, high=7, step=1), 0, 6),
        (Column("n", low=-0.5, high=6.5, step=1), 0, 6),
        (Column("n", low=0.3, high=0.9, step=0.1, origin=0.5), 0.4, 0.8),
        (Column("n", low=-1, step=1), 0, 100),
        (Column("n", high=7, step=1), -100, 6),
    ],
    ids=str,
)
def test_rounded_values_are_strictly_between_the_bounds(column: Column, least: float, most: float) -> None:
    ends = np.array([-100.0 if column.low is None else column.low, 100.0 if column.high is None else column.high])
    found = column.rounded(ends)
    np.testing.assert_allclose(found, [least, most], atol=1e-9)
    assert column.inside(found).all()


def test_an_index_that_pandas_wrote_is_no_column(tmp_path: Path) -> None:
    written = pyarrow.table({"a": [1.0, 2.0, 4.0], "__index_level_0__": [0, 1, 3]})
    for index, columns in (("__index_level_0__", ("a",)), ({"kind": "range"}, ("a", "__index_level_0__"))):
        described = written.replace_schema_metadata({"pandas": json.dumps({"index_columns": [index], "columns": []})})
        parquet.write_table(described, tmp_path / "t.parquet")
        assert files.read(tmp_path / "t.parquet").columns == columns


@pytest.mark.parametrize("scale", [1e300, 1e150, 1.0, 1e-150, 1e-300])
def test_columns_of_any_scale_are_standardised(tmp_path: Path, scale: float) -> None:
    found = prepared(tmp_path, text(ROWS * scale + scale))
    z, logdet = encoded(found.columns, found.values)
    train = found.splits["train"]
    np.testing.assert_allclose(z[train].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(z[train].std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(decoded(found.columns, z), found.values, rtol=1e-5, atol=1e-5 * scale)
    assert np.isfinite(logdet).all()


BOUNDED = [Column("x", 0.3, 2.0, *bounds) for bounds in ((None, None), (-1.0, 4.0), (-1.0, None), (None, 4.0))]


@pytest.mark.parametrize("column", BOUNDED, ids=str)
def test_a_columns_map_has_its_inverse_and_its_derivative(column: Column) -> None:
    x = np.linspace(-0.99, 3.99, 40)[:, None]
    z, logdet = encoded([column], x)
    np.testing.assert_allclose(decoded([column], z), x, rtol=1e-5, atol=1e-5)

    def exact(x: np.ndarray) -> np.ndarray:  # z is in float32, whose differences are rounded
        return column.unbounded(x)[0] / column.std

    h = 1e-6
    np.testing.assert_allclose(
        logdet, np.log((exact(x[:, 0] + h) - exact(x[:, 0] - h)) / (2 * h)), rtol=1e-6, atol=1e-8
    )


def test_rows_that_have_no_density_have_minus_infinity() -> None:
    columns = [BOUNDED[1], BOUNDED[0]]
    z, logdet = encoded(columns, np.array([[-1.0, 0.0], [4.0, 0], [9, 0], [0, 1e200], [0, -1e308], [0, 0]]))
    assert np.isneginf(logdet).tolist() == [True] * 5 + [False] and (z[:5] == 0).all()
