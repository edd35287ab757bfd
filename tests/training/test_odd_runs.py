"""Runs as crashes, disks and people leave them: nothing is lost, and nothing wrong is taken for right."""

import dataclasses
import errno
import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from glf_fast import evaluate, sample, train
from glf_fast.errors import UserError
from glf_fast.training import checkpoint, report, runs
from glf_fast.training.arguments import parse_train
from glf_fast.training.board import Board

Call = Callable[..., None]
CPU = torch.device("cpu")


@pytest.fixture
def run(smoke: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(smoke, tmp_path / "run"))


def read_everything(run: Path) -> None:
    """Read all that `evaluate` reads, and write the report."""
    runs.read_config(run)
    for which in ("best", "last"):
        folder = runs.checkpoint_folder(run, which)
        _, state = checkpoint.load_model(folder, CPU)
        checkpoint.check_state(folder, state)
    checkpoint.read(runs.checkpoint_folder(run, "last"), training=True)
    report.write(run)


FILES = [
    "config.toml", "metrics.jsonl", "scores.json", "checkpoints/last/checkpoint.json", "checkpoints/best/config.json",
    "checkpoints/best/model.safetensors", "checkpoints/last/training.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_one_line_or_harmless(file: str, run: Path) -> None:
    whole, chance = (run / file).read_bytes(), random.Random(file)
    config = runs.read_config(run)
    for i in range(9):
        damaged = bytearray(whole)
        at = chance.randrange(len(whole))
        if i % 3 == 0:
            del damaged[at:]
        elif i % 3 == 1:
            del damaged[at : at + chance.randrange(1, 40)]
        else:
            damaged[at] = chance.randrange(256)
        (run / file).write_bytes(damaged)
        message = ""
        try:
            read_everything(run)
        except (UserError, OSError) as error:
            message = str(error)
        if message:
            assert "\n" not in message, i
            continue
        assert file in ("config.toml", "metrics.jsonl", "scores.json", "checkpoints/last/checkpoint.json"), i
        if file == "config.toml":  # a changed number or a changed name is a setting like any other
            assert runs.read_config(run) != config or i % 3 == 2
    (run / file).write_bytes(whole)
    read_everything(run)


@pytest.mark.parametrize("text", ["", "# 3 settings\nepochs = 3\n"])
def test_a_config_with_missing_settings_is_not_filled_up(text: str, run: Path, call: Call) -> None:
    whole = (run / "config.toml").read_text()
    shorter = "".join(line for line in whole.splitlines(True) if not line.startswith("samples ="))
    for content in (text, shorter):
        (run / "config.toml").write_text(content)
        with pytest.raises(UserError, match=r"config.toml is damaged: settings are missing"):
            call(evaluate, run)


def test_one_damaged_line_of_the_log_costs_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(True)
    bad = [
        b"\xff\xfe\n",
        b'{"images": 5}\n',
        b'{"images": 5, "epoch": 1, "nll": "x"}\n',
        b'{"images": 5, "epoch": NaN}\n',
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], *bad, *lines[2:], b'{"images": 99']))
    records = runs.read_metrics(run)
    assert [json.loads(line) for line in lines] == records
    assert "metrics.jsonl: damaged lines are left out (3, 4, 5, 6)" in capsys.readouterr().err


def test_names_in_the_log_are_no_formulas(run: Path) -> None:
    record = {"images": 1, "epoch": 0.1, r"$\href{x}$": 1.0, "images_per_second": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write((json.dumps(record) + "\n") * 2)
    report.write(run)


def test_temporary_files_of_killed_writers_do_no_harm(run: Path, call: Call) -> None:
    left = [".config-abcd1234.toml", "samples/.000003072-abcd1234.png", ".scores-abcd1234.json"]
    for name in left:
        (run / name).write_bytes(b"")
        os.utime(run / name, (0, 0))
    report.write(run)
    call(train, "--preset", "smoke", "--out", run)
    assert not any((run / name).exists() for name in left)
    only = run.parent / "only"
    only.mkdir()
    (only / ".config-abcd1234.toml").write_bytes(b"")
    runs.check_folder(only, runs.read_config(run))


def test_a_second_process_changes_nothing(run: Path, call: Call) -> None:
    before = (run / "config.toml").read_text()
    with FileLock(run / ".lock"), pytest.raises(UserError, match="another process is training"):
        call(train, "--preset", "smoke", "--max-minutes", "0.01", "--out", run)
    assert (run / "config.toml").read_text() == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def acquire(self: FileLock) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with runs.lock(tmp_path / "run"):
        pass
    assert "file system without locks" in capsys.readouterr().err


def test_a_checkpoint_may_be_a_link_to_another_disk(run: Path, tmp_path: Path, call: Call) -> None:
    last = run / "checkpoints" / "last"
    (tmp_path / "disk").mkdir()
    shutil.move(last, tmp_path / "disk" / "last")
    last.symlink_to(tmp_path / "disk" / "last")
    call(train, "--preset", "smoke", "--epochs", "5", "--out", run)
    assert last.is_symlink() and checkpoint.read_state(last)["epoch"] == 5
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["last"]


def test_tensorboard_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    before = threading.excepthook
    with Board(tmp_path / "file" / "tensorboard", 0) as board:
        board.scalar("loss", 1.0, 0)
    with Board(tmp_path / "tensorboard", 0) as board:
        failing = threading.Thread(target=os.write, args=(-1, b"x"))  # as TensorBoard's own on a full disk
        failing.start()
        failing.join()
        board.scalar("loss", 1.0, 0)
        board.image("samples", torch.zeros(1, 8, 8, dtype=torch.uint8), 0)
    printed = capsys.readouterr().err
    assert printed.count("cannot be written") == 2 and "Traceback" not in printed
    assert threading.excepthook is before


def test_samples_of_two_calls_do_not_mix(run: Path, tmp_path: Path, call: Call) -> None:
    call(sample, run, "--n", "3", "--out", tmp_path / "images")
    with pytest.raises(UserError, match="is not empty, and its images would mix"):
        call(sample, run, "--n", "2", "--out", tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_other_data_than_the_runs_are_not_scored(run: Path, call: Call) -> None:
    index = json.loads((run / "checkpoints/best/checkpoint.json").read_text())
    del index["sha256"]  # version 0.1.0 wrote none
    index["state"]["data"] = "other"
    (run / "checkpoints/best/checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="digits holds other data than"):
        call(evaluate, run)


def test_another_model_does_not_need_a_preset() -> None:
    command = parse_train(["--model.name", "vae", "--model.latent-dim", "7"])
    assert (command.label, command.config.model.name, command.config.model.latent_dim) == ("vae", "vae", 7)
    assert runs.default_folder(command.config, command.base, command.label) == Path("runs/vae-model.latent_dim=7")
    assert parse_train([]).label == "quick" and parse_train(["--model.name", "glf"]).label == "quick"
    assert dataclasses.replace(parse_train([]).config, epochs=1).model.name == "glf"
