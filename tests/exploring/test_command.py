"""`python -m glf_fast.explore` as its users see it."""

import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import forked
import numpy as np
import pytest
import torch

from glf_fast import explore, train
from glf_fast.data import load
from glf_fast.data.attributes import attribute_names
from glf_fast.errors import UserError
from glf_fast.exploring.loading import open_run

Call = Callable[..., None]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs a command's main in this process."""

    def main(module: ModuleType, *arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        module.main()

    return main


def test_it_serves_until_ctrl_c(smoke: Path, coloured: Path) -> None:
    child = forked.Child(forked.command, "explore", str(smoke), str(coloured), "--port", "0")
    try:
        printed, until = Path(child._printed.name) / "stdout", time.monotonic() + 120
        while "exploring at " not in (text := printed.read_text() if printed.exists() else ""):
            assert child.poll() is None and time.monotonic() < until, child.communicate()
            time.sleep(0.05)
        url = text.split("exploring at ")[1].split()[0]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=60) as page:
            assert b"glf_fast" in page.read()
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
        assert child.returncode == 0 and out.endswith("stopped\n") and err == ""
    finally:
        child.close()


def test_wrong_runs_and_options_are_told_in_a_line(
    smoke: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"missing is not a run's folder \(no config.toml\)"):
        call(explore, smoke, tmp_path / "missing", "--port", "0")
    with pytest.raises(UserError, match="give the folder of a run"):
        call(explore)
    with pytest.raises(UserError, match="unknown option --host"):
        call(explore, smoke, "--host", "0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot be used"):
            call(explore, smoke, "--port", str(taken.getsockname()[1]))
    table = tmp_path / "a.csv"
    table.write_text("place,Smiling\n0,1\n")
    with pytest.raises(UserError, match="has no row for 1616 of the 1617 train images"):
        call(explore, smoke, "--attributes", table, "--port", "0")
    table.write_text("place\n0\n")
    with pytest.raises(UserError, match="needs a line of different names"):
        call(explore, smoke, "--attributes", table, "--port", "0")

    monkeypatch.delitem(sys.modules, "glf_fast.exploring.server", raising=False)
    monkeypatch.delattr("glf_fast.exploring.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"uvicorn, which the page needs, is not installed; .* 'glf_fast\[explore\]'"):
        call(explore, smoke, "--port", "0")


def test_runs_of_sequences_are_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("".join("(" * n + "x" + ")" * n + "\n" for n in range(6)) * 4)
    (tmp_path / "words.grammar").write_text("S -> 'x' | '(' S ')'\n")
    small = [
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--score.samples",
        "4",
        "--model.latent-dim",
        "2",
        "--model.units",
        "4",
    ]
    small += ["--model.layers", "1", "--model.dense", "8", "--model.channels", "4", "--model.kernels", "2"]
    source = ("--model.name", "character-vae", "--data.source", tmp_path / "words.txt")
    call(train, *source, *small, "--out", tmp_path / "run")
    with pytest.raises(
        UserError, match=r"run cannot be explored: its .* was trained on data of shape .*, and the page"
    ):
        call(explore, tmp_path / "run", "--port", "0")


def test_attributes_come_from_a_file(smoke: Path, tmp_path: Path) -> None:
    labels = load("digits", "train").labels
    table = tmp_path / "a.csv"
    table.write_text("place,even\n" + "".join(f"{i},{int(label % 2 == 0)}\n" for i, label in enumerate(labels)))
    run = open_run(smoke, torch.device("cpu"), attributes=table, names=attribute_names(table))
    assert run.codes is not None and run.codes.attributes[:2] == ("even", "label 0") and "edit" in run.abilities()
    assert run.codes.direction("even").norm() > 0


def test_data_that_have_changed_are_refused(call: Call, tmp_path: Path) -> None:
    data = tmp_path / "data.npy"
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), np.uint8)
    np.save(data, images)
    small = ("--preset", "smoke", "--epochs", "1", "--batch-size", "20", "--score.samples", "10", "--data.source", data)
    call(train, *small, "--out", tmp_path / "run")
    np.save(data, 255 - images)
    with pytest.raises(UserError, match=r"holds other data than .*run was trained on"):
        call(explore, tmp_path / "run", "--port", "0")
