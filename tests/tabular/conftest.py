"""The command `python -m glf_fast.fit` in the tests' own process, and a density that it has fitted."""

import contextlib
import io
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from glf_fast.tabular import files

NAMES = ["x", "share", "age", "one"]
SMALL = ("--flow.steps", "2", "--flow.hidden", "16", "--epochs", "6", "--lr", "0.01")
BOUNDS = ("--bounds", "share=0:2", "--dequantise", "age")


class Done(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object) -> Done:
    """What `python -m glf_fast.fit` does with these arguments."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["fit", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("glf_fast.fit", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return Done(int(stop.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("a command ends by sys.exit")


def rows(n: int = 300) -> np.ndarray:
    """Rows with columns NAMES: a number, one between 0 and 2, an integer, a constant."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=n)
    share = 2 / (1 + np.exp(-x - rng.normal(size=n)))
    return np.stack([100 + 30 * x, share, rng.poisson(4, n), np.full(n, 1.5)], 1)


class Fitted(NamedTuple):
    folder: Path
    table: Path
    done: Done


def fitted(folder: Path, *options: Sequence[str]) -> Fitted:
    files.write(folder / "table.csv", NAMES, rows())
    return Fitted(
        folder / "d", folder / "table.csv", run(folder / "table.csv", "--out", folder / "d", *SMALL, *options)
    )


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """p(x, share, age)."""
    return fitted(tmp_path_factory.mktemp("joint"), *BOUNDS)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """p(share | x, age), of one column."""
    return fitted(tmp_path_factory.mktemp("conditional"), "--context", "x", "age", "--bounds", "share=0:2")


@pytest.fixture
def command() -> Callable[..., Done]:
    return run


@pytest.fixture
def table() -> np.ndarray:
    return rows()


@pytest.fixture
def fit_again() -> Callable[..., Fitted]:
    return fitted
