"""The user's tables: what is read as rows of float32, and how the rest is refused, with its place in the file."""

import builtins
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from glf_fast.data import ImageDataset, TableDataset, as_images, load
from glf_fast.errors import UserError

ROWS = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
NAMES = ["a", "b c", "d,e"]


def save(path: Path, rows: np.ndarray) -> None:
    with path.open("wb") as file:  # numpy would append .npy to t.NPY
        np.save(file, rows)


def savez(path: Path, **arrays: object) -> None:
    with path.open("wb") as file:  # and .npz to t.npy
        np.savez(file, **arrays)


def write_csv(path: Path, header: str = "") -> None:
    lines = [",".join(f"{value:.9g}" for value in row) for row in ROWS]
    path.write_text("\n".join([header] * bool(header) + lines) + "\n", encoding="utf-8")


def write_parquet(path: Path, columns: dict) -> None:
    parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write", "columns"),
    [
        ("t.npy", lambda p: np.save(p, ROWS), ()),
        ("t.NPY", lambda p: save(p, np.asfortranarray(ROWS.astype(np.float64))), ()),
        ("t.npz", lambda p: np.savez(p, x=ROWS, columns=NAMES), tuple(NAMES)),
        ("t.csv", write_csv, ()),
        ("t.csv", lambda p: write_csv(p, '\ufeff a,b c,"d,e"'), tuple(NAMES)),
        ("t.csv", lambda p: (write_csv(p), p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n\r\n"))), ()),
        ("t.parquet", lambda p: write_parquet(p, dict(zip(NAMES, ROWS.T, strict=True))), tuple(NAMES)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable, columns: tuple) -> None:
    write(tmp_path / name)
    train, test = (load(str(tmp_path / name), split) for split in ("train", "test"))
    assert isinstance(train, TableDataset) and train.kind == "table" and train.shape == (3,)
    assert train.items.dtype == torch.float32 and train.items.is_contiguous()
    assert (len(train), len(test)) == (27, 3)
    both = torch.cat([train.items, test.items])
    assert sorted(both.tolist()) == sorted(ROWS.tolist()), "each row is in exactly one split, to the last bit"
    order = [ROWS.tolist().index(row) for row in train.items.tolist()]
    assert order == sorted(order), "in the order of the file"
    assert train.columns == test.columns == columns
    again = load(str(tmp_path / name))
    assert torch.equal(again.items, train.items) and again.fingerprint == train.fingerprint != test.fingerprint


def test_npz_with_splits_integers_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x_train=np.arange(8).reshape(4, 2), y_train=[0.0, 1, 1, 0], test=np.ones((2, 2), bool))
    train, test = (load(str(tmp_path / "t.npz"), split) for split in ("train", "test"))
    assert train.items.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]] and train.labels.tolist() == [0, 1, 1, 0]
    assert test.items.tolist() == [[1, 1], [1, 1]] and test.labels is None


def test_parquet_of_several_types(tmp_path: Path) -> None:
    columns = {"f": pyarrow.array([0.5, 1.5, 2.5], "float16"), "i": [1, 2, 3], "b": [True, False, True]}
    write_parquet(tmp_path / "t.parquet", columns)
    rows = [row for split in ("train", "test") for row in load(str(tmp_path / "t.parquet"), split).items.tolist()]
    assert sorted(rows) == [[0.5, 1, 1], [1.5, 2, 0], [2.5, 3, 1]]


def test_statistics_for_standardising() -> None:
    rows = torch.tensor([[1e6 + 1, 5.0, 0.1], [1e6 + 3, 5.0, 0.1]] * 500)
    data = TableDataset.of("t", "train", rows)
    assert data.mean.tolist() == pytest.approx([1e6 + 2, 5, 0.1], rel=1e-7)
    assert data.std.tolist() == [1, 1, 1], "a deviation of 1; then two constant features"
    x = (ROWS - ROWS.mean(0, dtype=np.float64)) / ROWS.std(0, dtype=np.float64)
    data = TableDataset.of("t", "train", torch.from_numpy(ROWS))
    assert np.allclose((data.items - data.mean) / data.std, x, atol=1e-6)


CSV = [
    ("", "is empty; a table needs"),
    ("\n\n", "is empty; a table needs"),
    ("a,b\n", "has a header but no rows"),
    ("1,2\n", r"holds 1 item\(s\); at least two"),
    ("a,b\n1,2\n3\n", r"line 3 has 1 value\(s\), but the first line has 2"),
    ("1,2\n\n3,4,5\n", r"line 3 has 3 value\(s\)"),
    ('a,b\n1,"2\n3",4\n5,6\n', r"line 3 has 3 value\(s\), but the first line has 2"),
    ("a,b\n1,2\n3,x\n", r"line 3: column 'b' is 'x', not a number; remove the column or encode"),
    ("1,2\n3,x\n", r"line 2: column 2 is 'x', not a number"),
    ("a,b\n1,2020_01\n", r"line 2: column 'b' is '2020_01', not a number"),
    ("a,b\n1, \n", r"line 2: column 'b' is empty; missing values are not allowed"),
    ("a,b\n1,2\n\nnan,4\nnan,5\n", r"line 4: column 'a' is nan, not a finite number \(2 such value\(s\)\); drop"),
    ("a\n1\n\n3\n\n", r"line 3: column 'a' is empty; missing values are not allowed"),
    ("1,inf\n3,4\n", r"line 1: column 2 is inf, not a finite number"),
    ("1,1e39\n3,4\n", r"line 1: column 2 is 1e\+39, too large for float32"),
    (",a\n0,1\n1,2\n", r"line 1: column 1 has no name; .*to_csv\(index=False\)"),
    ("0,1,2\n5,6,7\n", r"line 1 counts 0, 1, 2 …, .*to_csv\(header=False, index=False\)"),
    ("?,2,3\n4,5,6\n", r"line 1 holds numbers and text \('2', '\?' …\), so it is neither a row nor a header"),
    ("1;2\n3;4\n5;6\n", r"line 2 separates values by ';'; separate them by commas"),
    ('1,"2\n', r"line 1 is not CSV \(unexpected end of data\)"),
    ("é,b\n1,2\n".encode("latin-1"), "is not UTF-8 text"),
]


@pytest.mark.parametrize(("content", "message"), CSV)
def test_bad_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path / "t.csv"))
    assert str(tmp_path / "t.csv") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda p: np.save(p, np.full((4, 2), 1j)), "holds complex128; rows of a table must be real numbers"),
        (lambda p: np.save(p, np.full((4, 2), "1")), "holds <U1; rows of a table must be real numbers"),
        (lambda p: np.save(p, [[1, 2], [3, np.nan]]), r"\(rows\), row 1: column 2 is nan, not a finite number"),
        (lambda p: np.save(p, [[1, 2], [1e39, 2]]), "row 1: column 1 is 1e.39, too large for float32"),
        (lambda p: np.save(p, np.zeros((5, 0))), r"must hold float32 rows \(N, D\), N ≥ 1, D ≥ 1"),
        (lambda p: np.save(p, np.zeros(5)), r"has shape \(5,\); images are .*, and rows of a table are \(N, D\)"),
        (
            lambda p: p.write_bytes(pickle.dumps(ROWS)),
            "pickled objects are never loaded, because they can execute code",
        ),
        (lambda p: (np.save(p, ROWS), p.write_bytes(p.read_bytes()[:-9])), "cannot be read as plain numpy arrays"),
        (lambda p: savez(p, x=ROWS, columns=["a"]), "has 3 columns but 1 column names"),
        (lambda p: savez(p, x=ROWS, columns=3), "columns must be a list of strings; got int64"),
        (lambda p: savez(p, x=ROWS, y=np.zeros((30, 2))), "30 items but 60 labels"),
    ],
)
def test_bad_arrays(tmp_path: Path, save: Callable, message: str) -> None:
    save(tmp_path / "t.npy")
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "t.npy"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: write_parquet(p, {"a": ["x", "y"]}), "column 'a' holds string, not numbers"),
        (lambda p: write_parquet(p, {"a": [1, 2], "b": [1, None]}), r"column 'b' has 1 missing value\(s\); drop"),
        (lambda p: write_parquet(p, {"a": [1.0, 2.0], "b": [1.0, np.inf]}), "row 1: column 'b' is inf, not a finite"),
        (lambda p: write_parquet(p, {"a": pyarrow.array([], "int8")}), "has 0 rows and 1 columns"),
        (lambda p: p.write_bytes(b"PAR1 nonsense"), "is damaged or not a Parquet file"),
        (
            lambda p: (write_parquet(p, {"a": [1, 2]}), p.write_bytes(p.read_bytes()[:-20])),
            "is damaged or not a Parquet",
        ),
        (lambda p: p.write_bytes(b""), "is damaged or not a Parquet file"),
    ],
)
def test_bad_parquet(tmp_path: Path, write: Callable, message: str) -> None:
    write(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message) as error:
        load(str(tmp_path / "t.parquet"))
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "t.parquet", {"a": [1, 2]})
    imported = builtins.__import__

    def without(name: str, *arguments: object, **keywords: object) -> object:
        if name == "pyarrow":
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "glf_fast\[parquet\]"'):
        load(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("name", ["t.pkl", "t.pickle", "t.pt", "t.PTH", "t.joblib"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(ROWS))
    with pytest.raises(UserError, match=r"is a pickle by its name; pickles are never loaded, .*numpy\.save"):
        load(str(tmp_path / name))


def test_a_table_is_no_images(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", ROWS)
    with pytest.raises(UserError, match=r"t.npy holds rows of a table; images are needed"):
        as_images(load(str(tmp_path / "t.npy")))
    images = ImageDataset.of("i", "train", torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert as_images(images) is images
