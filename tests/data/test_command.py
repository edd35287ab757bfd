"""python -m glf_fast.data: what it prints, and its one-line errors."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from glf_fast.data import __main__ as command
from glf_fast.errors import run_command


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("height,weight\n" + "1.5,60\n2.5,60\n" * 10, encoding="utf-8")
    np.save("wide.npy", np.zeros((10, 25)))
    np.savez("s.npz", tokens=[[1, 2, 0], [1, 1, 1]] * 5, vocabulary=["<end>", "x", "y"])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["list"], 0, "cifar10        CIFAR-10: photographs"),
        (["list"], 0, "inception      The Inception network"),
        (["info", "digits"], 0, "licence   BSD-3-Clause (scikit-learn)"),
        (["info", "digits"], 0, "train     (1617, 1, 8, 8) uint8, fingerprint d86be41e24906957"),
        (["info", "inception"], 0, "\nnot on this machine yet; python -m glf_fast.data fetch inception fetches it\n"),
        (
            ["info", "cifar10"],
            0,
            "items     50,000 train, 10,000 test\nnot on this machine yet; python -m glf_fast.data fetch cifar10 fetches it\n",
        ),
        (["info", "a.csv"], 0, "kind      rows of a table\ntrain     (18, 2) float32"),
        (["info", "a.csv"], 0, "column    weight: mean 60, standard deviation 1\npolicy    test: a tenth"),
        (["info", "wide.npy"], 0, "column    20: mean 0, standard deviation 1\n          … and 5 more columns\n"),
        (["info", "s.npz"], 0, "tokens    3 in the vocabulary, '<end>' is padding\nlengths   2 … 3, mean 2."),
        (["grammar", "smiles"], 0, "molecule -> atom tail\ntail -> | ring tail"),
        (["grammar", "smile"], 2, "error: invalid choice 'smile'"),
        (
            ["fetch", "digit"],
            2,
            "error: no data set, weights or path 'digit'; did you mean 'digits'? give one of fashion-mnist, ",
        ),
        (["fetch"], 2, "error: python -m glf_fast.data fetch needs NAME; "),
        (["fetch", "digits", "--data-dr", "x"], 2, "error: unknown option --data-dr; did you mean '--data-dir'?"),
        (["info", "digits", "--foo"], 2, "error: unknown option --foo; python -m glf_fast.data --help lists"),
        (["info", "digits", "--data-dir", "/nope"], 2, "error: --data-dir /nope is not a folder"),
    ],
)
def test_command(
    arguments: list[str], code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_command(command.main)
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    assert text in out + err
    assert "cache  " not in out, "the cache is empty"
    assert len(err.splitlines()) == bool(code), err


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m glf_fast.data`."""
    monkeypatch.setattr(sys, "argv", ["data", "info", "nothing"])
    monkeypatch.delitem(sys.modules, "glf_fast.data.__main__")
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("glf_fast.data", run_name="__main__", alter_sys=True)
    errors = capsys.readouterr().err
    assert errors.startswith("error: no data set, weights or path 'nothing'") and len(errors.splitlines()) == 1
