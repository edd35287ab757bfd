"""A run of preset smoke, trained once, and helpers to run the commands."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import forked
import pytest
import quick_command_lines  # noqa: F401 - for its effect

from glf_fast import train
from glf_fast.training import report

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def cache(once: Once) -> Path:
    """Where reference statistics go here; nothing here is downloaded."""
    return once("cache", Path.mkdir)


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLF_FAST_CACHE", str(cache))


@pytest.fixture
def curves() -> None:
    """Asked for by tests whose reports need their curves."""


@pytest.fixture(autouse=True)
def few_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' reports have no curves, which are half of a short run's time. Those of session-wide runs have them."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(report, "_curves", lambda records, words: "")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command's main in this process: call(train, "--preset", "smoke")."""

    def main(module: ModuleType, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return main


@pytest.fixture
def command() -> Iterator[Callable[..., forked.Child]]:
    """Starts `python -m glf_fast.{module} …` as a process of its own, one thread, warnings as errors."""
    with contextlib.ExitStack() as stack:

        def start(module: str, *arguments: str | Path, file_size: int | None = None) -> forked.Child:
            child = forked.Child(forked.command, module, *map(str, arguments), file_size=file_size)
            return stack.enter_context(contextlib.closing(child))

        yield start


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The same, started by the shell's means: it takes seconds longer."""
    with contextlib.ExitStack() as stack:

        def start(module: str, *arguments: str | Path) -> subprocess.Popen[str]:
            program = [sys.executable, "-W", "error", "-m", f"glf_fast.{module}", *map(str, arguments)]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(program, env=one_thread, text=True, **pipes)
            stack.enter_context(process)
            stack.callback(process.kill)  # before the wait that leaving the process's own context means
            return process

        yield start


@pytest.fixture(scope="session")
def smoke(once: Once, cache: Path) -> Path:
    """A finished run of preset smoke; not to be changed."""

    def finished(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GLF_FAST_CACHE", str(cache))
            patch.setattr(sys, "argv", ["train", "--preset", "smoke", "--out", str(folder)])
            train.main()

    return once("smoke", finished)


@pytest.fixture
def run(smoke: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(smoke, tmp_path / "run"))
