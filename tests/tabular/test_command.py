"""python -m glf_fast.fit as its users see it."""

import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import glf_fast
from glf_fast.errors import UserError
from glf_fast.fitting import fit, progress_file
from glf_fast.models.flow_settings import FlowSettings
from glf_fast.tabular import TableDensity, files
from glf_fast.tabular import run as run_module
from glf_fast.tabular.columns import Column, encoded
from glf_fast.tabular.preparation import Options, prepare
from glf_fast.tabular.univariate import UnivariateFlow

OPTIONS = Options(bounds=("share=0:2",), dequantise=("age",))


class Page(HTMLParser):
    """Notes the titles of a page, and that its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)


# -- fitting --------------------------------------------------------------------------------------------------------------


def test_a_fit_leaves_a_density_and_its_report(joint: Any) -> None:
    assert joint.done.code == 0, joint.done.err
    assert (
        "Column 'one' is constant (1.5) in the training rows; it is left out" in joint.done.err
        and "report" in joint.done.out
    )
    names = {path.name for path in joint.folder.iterdir()} - {".lock"}
    assert names == {"config.json", "model.safetensors", "progress.fit", "report.html", "result.json"}
    page = (joint.folder / "report.html").read_text()
    assert Page(page).titles == ["Calibration", "Data and samples", "Losses", "Columns", "All numbers"]
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page), "it loads nothing"
    result = json.loads((joint.folder / "result.json").read_text())
    assert result["rows"] == {"train": 240, "validation": 30, "test": 30} and len(result["notes"]) == 1
    assert [entry["of"] for entry in result["calibration"]["distance"]] == ["log_prob", "x", "share", "age"]


def test_likelihoods_are_those_of_the_rows_in_the_units_of_the_table(joint: Any) -> None:
    density, prepared = TableDensity.load(joint.folder), prepare(joint.table, OPTIONS, seed=0)
    found = json.loads((joint.folder / "result.json").read_text())["log_likelihood"]
    for split in ("train", "validation", "test"):
        values, _ = prepared.rows(split)
        assert found["flow"][split]["mean"] == pytest.approx(density.log_prob(values).mean(), abs=1e-5)
    train, test = (prepared.rows(split)[0] for split in ("train", "test"))
    y, _ = zip(*(column.unbounded(train[:, i]) for i, column in enumerate(density.columns)), strict=True)
    y_test, slope_test = zip(*(c.unbounded(test[:, i]) for i, c in enumerate(density.columns)), strict=True)
    covariance, off = np.cov(np.stack(y)), np.stack(y_test) - np.stack(y).mean(1, keepdims=True)
    normal = -0.5 * ((off * np.linalg.solve(covariance, off)).sum(0) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    assert found["gaussian"]["test"]["mean"] == pytest.approx((normal + np.stack(slope_test).sum(0)).mean(), abs=1e-4)
    assert found["flow"]["test"]["mean"] > found["gaussian"]["test"]["mean"] - 1


@pytest.mark.parametrize("end", ["Ctrl-C", "kill"])
def test_the_same_command_resumes(
    joint: Any, fit_again: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    class Killed(BaseException):
        pass

    def ends(result: object) -> None:
        if len(result.training_loss) == 3:  # type: ignore[attr-defined]
            if end == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT)

    options = ("--bounds", "share=0:2", "--dequantise", "age")
    with monkeypatch.context() as patch:
        patch.setattr(progress_file.ProgressFile, "due", lambda self: True)  # it is written after every epoch
        patch.setattr(run_module, "fit", lambda *args, **kwargs: fit(*args, **kwargs, callback=ends))
        if end == "kill":
            with pytest.raises(Killed):
                fit_again(tmp_path, *options)
        else:
            stopped = fit_again(tmp_path, *options).done
            assert stopped.code == 130 and "the same command goes on from" in stopped.err
        assert [path.name for path in (tmp_path / "d").iterdir() if path.name[0] != "."] == ["progress.fit"]
    again = fit_again(tmp_path, *options)
    assert again.done.out.splitlines()[2:6] == joint.done.out.splitlines()[2:6]
    whole, resumed = (load_file(place / "model.safetensors") for place in (joint.folder, again.folder))
    assert all(bool((whole[name] == resumed[name]).all()) for name in whole)


def test_folders_of_something_else_are_left_alone(joint: Any, command: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    files.write(other, ["a", "b"], np.random.default_rng(0).normal(size=(40, 2)))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    for out, message in (
        (tmp_path / "thesis", "holds other files; choose another --out, or delete the folder"),
        (other, "is a file, not a folder"),
        (joint.folder, r"the run in .*progress\.fit has (another flow|other data); choose another --out"),
    ):
        before = out.stat().st_mtime
        done = command(other, "--out", out)
        assert done.code == 2 and re.search(f"^error: .*{message}", done.err.splitlines()[-1]), done.err
        assert out.stat().st_mtime == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "No such file"),
        (["{table}", "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["{table}", "--lr", "nan"], "--lr nan must be"),
        (["{table}", "--batch-size", "10000"], "larger than the 240 rows"),
        (["{table}", "--context", "x", "--flow.kind", "rnvp", "--flow.coupling", "affine"], "takes no context"),
        (["{table}", "--columns", "x", "--flow.coupling", "affine"], "made of splines"),
        (["{table}", "--flow.steps", "0"], "flow.steps"),
        (["{folder}"], "give either --score TABLE or --sample N"),
        (["{folder}", "--sample", "0"], "--sample 0 must be"),
        (["{folder}", "--sample", "3", "--context-from", "{table}"], "has no context columns"),
        (["{folder}", "--score", "{table}", "--out", "scores.txt"], "not the name of a table"),
        (["{folder}/..", "--sample", "3"], "has no config.json"),
    ],
)
def test_mistakes_are_named_in_one_line(
    joint: Any, command: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [word.format(table=joint.table, folder=joint.folder) for word in arguments]
    out = [] if "--out" in filled or "{folder}" in arguments[0] else ["--out", tmp_path / "d"]
    done = command(*filled, *out)
    assert done.code == 2 and message in done.err.splitlines()[-1], done.err
    assert not list(tmp_path.iterdir()) or not list((tmp_path / "d").glob("*")), "nothing is left behind"


# -- scores and samples ---------------------------------------------------------------------------------------------------


def test_scores_are_log_prob_whatever_the_order_of_columns(
    joint: Any, command: Callable[..., Any], table: np.ndarray, tmp_path: Path
) -> None:
    density = TableDensity.load(joint.folder)
    expected = density.log_prob(table[:, :3])
    files.write(tmp_path / "other.csv", ["name", "age", "x", "share"], table[:, [3, 2, 0, 1]])
    (tmp_path / "other.csv").write_text((tmp_path / "other.csv").read_text().replace("1.5,", "Ada,"))
    np.save(tmp_path / "all.npy", table)  # without names: all columns, or those of the density
    np.save(tmp_path / "own.npy", table[:, :3])
    for source in (joint.table, tmp_path / "other.csv", tmp_path / "all.npy", tmp_path / "own.npy"):
        done = command(joint.folder, "--score", source)
        assert done.code == 0, done.err
        header, *lines = done.out.splitlines()
        assert header == "log_prob" and [float(line) for line in lines] == expected.tolist()
    assert command(joint.folder, "--score", joint.table, "--out", tmp_path / "scores.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy")[:, 0], expected)


def test_rows_to_score_may_be_out_of_bounds_or_incomplete(
    joint: Any, command: Callable[..., Any], table: np.ndarray, tmp_path: Path
) -> None:
    table[0, 1], table[1, 0] = 2.5, np.nan
    files.write(tmp_path / "t.csv", ["x", "share", "age"], table[:5, :3])
    refused = command(joint.folder, "--score", tmp_path / "t.csv")
    assert refused.code == 2 and "1 of 5 rows" in refused.err and "--drop-missing" in refused.err
    done = command(joint.folder, "--score", tmp_path / "t.csv", "--drop-missing")
    assert done.out.splitlines()[1] == "-inf" and done.out.splitlines()[2] == '""' and len(done.out.splitlines()) == 6
    assert "1 rows have the score -inf" in done.err
    files.write(tmp_path / "t.csv", ["x", "age"], table[2:5, [0, 2]])
    assert "has no column 'share'" in command(joint.folder, "--score", tmp_path / "t.csv").err


def test_contexts_far_from_all_others_have_no_density_and_no_samples(
    conditional: Any, command: Callable[..., Any], table: np.ndarray, tmp_path: Path
) -> None:
    table[1, 0] = 1e30
    files.write(tmp_path / "t.csv", ["x", "share", "age"], table[:3, :3])
    scores = command(conditional.folder, "--score", tmp_path / "t.csv").out.splitlines()[1:]
    assert np.isfinite([float(score) for score in scores]).tolist() == [True, False, True] and scores[1] == "-inf"
    done = command(conditional.folder, "--sample", 2, "--context-from", tmp_path / "t.csv")
    assert done.code == 2 and re.match(r"error: .*t\.csv, line 3: column 'x' is 1e\+30, too far", done.err), done.err
    with pytest.raises(ValueError, match="too large for float32 in row 1"):
        TableDensity.load(conditional.folder).sample(3, table[:3, [0, 2]])


def test_empty_lines_keep_their_place_among_the_scores(command: Callable[..., Any], tmp_path: Path) -> None:
    density = TableDensity(FlowSettings(steps=1, hidden=(8,), coupling="spline"), [Column("a")])
    density.save(tmp_path / "d")
    (tmp_path / "t.csv").write_text("a\n0.5\n\n2.5\n\n")
    done = command(tmp_path / "d", "--score", tmp_path / "t.csv", "--drop-missing")
    first, second = density.log_prob(np.array([[0.5], [2.5]])).tolist()
    assert done.out.splitlines() == ["log_prob", repr(first), '""', repr(second)], done.err


def test_rows_without_a_finite_likelihood_are_reported(
    fit_again: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scored = TableDensity.log_prob

    def lost(self: TableDensity, values: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
        found = scored(self, values, context)
        if len(found) == 30:  # of 300 rows in validation and test
            found[0] = -np.inf
        return found - 123456789.125

    monkeypatch.setattr(TableDensity, "log_prob", lost)
    found = fit_again(tmp_path, "--bounds", "share=0:2")
    assert found.done.code == 0, found.done.err
    result = json.loads((found.folder / "result.json").read_text())
    test = result["log_likelihood"]["flow"]["test"]
    assert test == {"mean": None, "error": None, "rows": 30, "lost": 1}
    assert any("1 of 30 test rows have no finite log-likelihood" in note for note in result["notes"])
    columns = next(line for line in found.done.out.splitlines() if line.startswith("flow")).split()
    assert columns[0] == "flow" and float(columns[1]) == pytest.approx(-123456789, rel=1e-5), "large numbers are apart"
    assert columns[2:] == ["-inf", "-inf"] and "1 of 30 test rows" in found.done.err


def test_densities_of_one_column_take_no_rows() -> None:
    assert UnivariateFlow(2, (8,)).log_prob(torch.empty(0, 1)).shape == (0,)
    assert UnivariateFlow(2, (8,), 3).log_prob(torch.empty(0, 1), torch.empty(0, 3)).shape == (0,)


def test_samples_are_a_table_like_the_first(joint: Any, command: Callable[..., Any], tmp_path: Path) -> None:
    done = command(joint.folder, "--sample", 200, "--out", tmp_path / "samples.parquet")
    assert done.code == 0, done.err
    found = files.read(tmp_path / "samples.parquet")
    assert found.columns == ("x", "share", "age") and found.values.shape == (200, 3)
    x, share, age = found.values.T
    assert 50 < x.mean() < 150 and share.min() > 0 and share.max() < 2 and (age == age.round()).all()
    assert command(joint.folder, "--sample", 5).out == command(joint.folder, "--sample", 5, "--seed", 0).out
    assert command(joint.folder, "--sample", 5).out != command(joint.folder, "--sample", 5, "--seed", 1).out


def test_a_conditional_density(
    conditional: Any, command: Callable[..., Any], table: np.ndarray, tmp_path: Path
) -> None:
    assert conditional.done.code == 0, conditional.done.err
    density = TableDensity.load(conditional.folder)
    expected = density.log_prob(table[:, [1]], table[:, [0, 2]])
    scores = command(conditional.folder, "--score", conditional.table).out.splitlines()[1:]
    assert [float(line) for line in scores] == expected.tolist()
    files.write(tmp_path / "contexts.csv", ["age", "x"], np.array([[4.0, 60.0], [4.0, 140.0]]))
    done = command(
        conditional.folder, "--sample", 300, "--context-from", tmp_path / "contexts.csv", "--out", tmp_path / "s.csv"
    )
    found = files.read(tmp_path / "s.csv")
    assert found.columns == ("x", "age", "share") and (found.values[:, 0] == np.repeat([60, 140], 300)).all(), done.err
    low, high = found.values[:300, 2].mean(), found.values[300:, 2].mean()
    assert low < 0.8 and high > 1.2, "a larger x has a larger share"
    assert "give a table with the columns x, age" in command(conditional.folder, "--sample", 3).err


# -- the density ----------------------------------------------------------------------------------------------------------


def test_densities_integrate_to_one_in_the_units_of_the_table(joint: Any, conditional: Any) -> None:
    one = TableDensity.load(conditional.folder)
    edges = np.linspace(0, 2, 4001)
    share = (edges[1:] + edges[:-1]) / 2
    for context in ([100.0, 4.0], [130.0, 9.0]):
        p = np.exp(one.log_prob(share[:, None], np.broadcast_to(context, (4000, 2))))
        assert p.sum() * (edges[1] - edges[0]) == pytest.approx(1, abs=2e-3)
    three = TableDensity.load(joint.folder)
    axes = [np.linspace(-80, 280, 91), (np.arange(60) + 0.5) / 30, np.linspace(-4, 18, 67)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert np.exp(three.log_prob(grid)).sum() * cell == pytest.approx(1, abs=0.02)


def test_log_prob_is_a_change_of_variables(joint: Any, table: np.ndarray) -> None:
    density = TableDensity.load(joint.folder)
    x = table[:4, :3]

    def noise(x: np.ndarray) -> np.ndarray:
        """z of the whole map; finite differences need it in float64."""
        y = np.stack([(c.unbounded(x[:, i])[0] - c.mean) / c.std for i, c in enumerate(density.columns)], 1)
        return density.flow.double()(torch.from_numpy(y))[0].detach().numpy()

    expected = density.log_prob(x)
    for row, value in zip(x, expected, strict=True):
        steps = 1e-5 * np.diag([30.0, 1.0, 2.0])
        jacobian = (noise(row + steps) - noise(row - steps)) / (2 * steps.diagonal()[:, None])
        z = noise(row[None])[0]
        log_normal = -0.5 * (z @ z + 3 * np.log(2 * np.pi))
        assert value == pytest.approx(log_normal + np.linalg.slogdet(jacobian)[1], abs=1e-4)


def test_arrays_of_other_shapes_are_refused(joint: Any, conditional: Any) -> None:
    density, given = TableDensity.load(joint.folder), TableDensity.load(conditional.folder)
    with pytest.raises(ValueError, match=r"\(rows, 3\); got \(5, 2\)"):
        density.log_prob(np.zeros((5, 2)))
    with pytest.raises(ValueError, match="NaN or infinity in row 0"):
        density.log_prob(np.full((1, 3), np.nan))
    with pytest.raises(ValueError, match="takes no context"):
        density.sample(2, np.zeros((2, 1)))
    with pytest.raises(ValueError, match="give a context with the columns x, age"):
        given.sample(2)
    assert density.sample(0).shape == (0, 3) and density.log_prob(np.empty((0, 3))).shape == (0,)
    assert given.sample(4, np.array([100.0, 4.0])).shape == (4, 1)
    assert np.isfinite(encoded(density.columns, density.sample(100))[1]).mean() > 0.9


def test_a_damaged_density_is_named(joint: Any, tmp_path: Path) -> None:
    config = json.loads((joint.folder / "config.json").read_text())
    weights = (joint.folder / "model.safetensors").read_bytes()
    for change, message in (
        ({"columns": []}, "columns"),
        ({"columns": [{"name": "x", "std": -1.0}]}, "std"),
        ({"columns": [{"name": "x", "mean": "0"}]}, "mean"),
        ({"context": None}, "damaged"),
        ({"table": ["x"]}, "columns of the table"),
        ({"flow": {"steps": 3, "coupling": "spline", "hidden": [16]}}, "belongs to another config.json"),
        ({"table_density": 2}, "is not that of a density"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        (tmp_path / "model.safetensors").write_bytes(weights)
        with pytest.raises(UserError, match=message):
            TableDensity.load(tmp_path)


# -- the name -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", ["import glf_fast.fit", "from glf_fast import fit", "import glf_fast.fit as f", "run", ""]
)
def test_the_function_keeps_its_name_beside_the_command(
    first: str, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m glf_fast.fit` and `glf_fast.fit(flow, x)`, in any order of imports."""
    monkeypatch.delitem(sys.modules, "glf_fast.fit", raising=False)
    glf_fast.__dict__.pop("fit", None)
    names: dict[str, Any] = {}
    if first == "run":
        assert command("--help").code == 0
    else:
        exec(first, names)
    assert glf_fast.fit is fit and names.get("fit", fit) is fit and names.get("f", fit) is fit
    monkeypatch.delitem(sys.modules, "glf_fast.fit", raising=False)
    assert importlib.import_module("glf_fast.fit") is fit and glf_fast.fit is fit
    monkeypatch.delitem(sys.modules, "glf_fast.fit", raising=False)
    assert "TABLE" in command("--help").out and glf_fast.fit is fit
