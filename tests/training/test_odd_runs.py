"""Runs as crashes, disks and people leave them: nothing is lost, and nothing wrong is taken for right."""

import contextlib
import dataclasses
import errno
import fcntl
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
from torch.utils.tensorboard import SummaryWriter

from glf_fast import evaluate, files, sample, train
from glf_fast.errors import UserError
from glf_fast.training import board as board_module
from glf_fast.training import checkpoint, pictures, report, runs
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


@pytest.mark.usefixtures("curves")
@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_one_line_or_harmless(file: str, count: int, run: Path) -> None:
    whole, chance = (run / file).read_bytes(), random.Random(file)
    config = runs.read_config(run)
    for i in range(count):
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
    without_number = whole.split("\n", 1)[1]
    for content in (text, shorter, without_number, f"# {'9' * 5000} settings\n{without_number}"):
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
        b'{"images": 5, "epoch": 1, "nll": %s}\n' % (b"9" * 400),
        b'{"images": %s, "epoch": 1}\n' % (b"9" * 400),
    ]
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], *bad, *lines[2:], b'{"images": 99']))
    records = runs.read_metrics(run)
    assert [json.loads(line) for line in lines] == records
    assert "metrics.jsonl: damaged lines are left out (3, 4, 5, 6, 7, …)" in capsys.readouterr().err


@pytest.mark.usefixtures("curves")
def test_names_in_the_log_are_no_formulas(run: Path) -> None:
    # The losses that the model has curves of are left out, in favour of which others are not drawn.
    record = {"images": 1, "epoch": 0.1, r"$\href{x}$": 1.0, "images_per_second": 1.0}
    (run / "metrics.jsonl").write_text((json.dumps(record) + "\n") * 2)
    report.write(run)
    assert "href{x}" in (run / "report.html").read_text()


def test_temporary_files_of_killed_writers_do_no_harm(run: Path, call: Call) -> None:
    left = [".config-abcd1234.partial.toml", "samples/.000003072-abcd1234.partial.png", ".scores-abcd1234.partial.json"]
    for name in left:
        (run / name).write_bytes(b"")
        os.utime(run / name, (0, 0))
    report.write(run)
    call(train, "--preset", "smoke", "--out", run)
    assert not any((run / name).exists() for name in left)
    only = run.parent / "only"
    only.mkdir()
    (only / ".config-abcd1234.partial.toml").write_bytes(b"")
    runs.check_folder(only, runs.read_config(run))


def test_a_second_process_changes_nothing(run: Path, call: Call) -> None:
    before = (run / "config.toml").read_text()
    with FileLock(run / ".lock"), pytest.raises(UserError, match="another process is training"):
        call(train, "--preset", "smoke", "--max-minutes", "0.01", "--out", run)
    assert (run / "config.toml").read_text() == before


def test_scores_that_cannot_be_written_are_printed(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(path: Path, content: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(runs, "write_json", refuses)
    with pytest.raises(OSError, match=r"Read-only file system: .*scores.json"):
        call(evaluate, run, "--n", "20")
    assert "FD[tiny]" in capsys.readouterr().out


def test_flock_that_does_not_exist_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(tmp_path / "run"):
        pass
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and "file system without locks" in printed


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def acquire(self: FileLock) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with files.lock(tmp_path / "run"):
        pass
    assert "file system without locks" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(FileLock, "release", acquire)
    with files.lock(tmp_path / "run"):
        pass


def test_a_checkpoint_may_be_a_link_to_another_disk(run: Path, tmp_path: Path, call: Call) -> None:
    last = run / "checkpoints" / "last"
    (tmp_path / "disk").mkdir()
    shutil.move(last, tmp_path / "disk" / "last")
    last.symlink_to(tmp_path / "disk" / "last")
    call(train, "--preset", "smoke", "--epochs", "5", "--out", run)
    assert last.is_symlink() and checkpoint.read_state(last)["epoch"] == 5
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["last"]


def test_tensorboard_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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

    def writer(*arguments: object, **options: object) -> SummaryWriter:
        failing = threading.Thread(target=os.write, args=(-1, b"x"))  # the thread writes before the writer is there
        failing.start()
        failing.join()
        return SummaryWriter(*arguments, **options)

    monkeypatch.setattr(board_module, "SummaryWriter", writer)
    with Board(tmp_path / "again", 0) as board:
        board.scalar("loss", 1.0, 0)
    printed = capsys.readouterr().err
    assert printed.count("cannot be written") == 3 and "Traceback" not in printed
    assert threading.excepthook is before


def test_samples_of_two_calls_do_not_mix(run: Path, tmp_path: Path, call: Call) -> None:
    call(sample, run, "--n", "3", "--out", tmp_path / "images")
    with pytest.raises(UserError, match="is not empty, and its images would mix"):
        call(sample, run, "--n", "2", "--out", tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_a_sample_that_ends_early_leaves_nothing(
    run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images"
    save = sample.save_png

    def full(path: Path, image: object) -> None:
        if path.name == "000002.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(path, image)

    monkeypatch.setattr(sample, "save_png", full)
    with pytest.raises(OSError, match="No space left"):
        call(sample, run, "--n", "4", "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".images*"))
    monkeypatch.undo()
    out.mkdir()
    (out / ".000000-abcd1234.partial.png").write_bytes(b"left by a kill")
    call(sample, run, "--n", "4", "--out", out)
    assert len(list(out.glob("[!.]*"))) == 4


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


# -- links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["samples", "reconstructions", "interpolations", "tensorboard"])
def test_nothing_is_written_through_links_out_of_the_folder(name: str, run: Path, tmp_path: Path, call: Call) -> None:
    shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    with pytest.raises(UserError, match=rf"/{name} is a link to .*/elsewhere, outside of the run's folder"):
        call(train, "--preset", "smoke", "--epochs", "5", "--out", run)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == before


def test_the_whole_folder_and_its_checkpoints_may_be_links(run: Path, tmp_path: Path, call: Call) -> None:
    shutil.move(run / "checkpoints", tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    shutil.move(run / "samples", run / "more")
    (run / "samples").symlink_to("more")  # which stays within the folder
    (tmp_path / "link").symlink_to(run)
    call(train, "--preset", "smoke", "--epochs", "5", "--out", tmp_path / "link")
    assert checkpoint.read_state(tmp_path / "disk" / "last")["epoch"] == 5


def test_a_linked_checkpoint_survives_a_kill_between_its_two_renames(run: Path, tmp_path: Path) -> None:
    last = run / "checkpoints" / "last"
    shutil.move(last, tmp_path / "disk")
    last.symlink_to(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / ".disk-previous")
    assert checkpoint.exists(last) and checkpoint.read_state(last)["epoch"] == 4


def test_a_checkpoint_replaces_checkpoints_alone(run: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    shutil.rmtree(run / "checkpoints" / "best")
    (run / "checkpoints" / "best").symlink_to(tmp_path / "papers")
    with pytest.raises(UserError, match=r"checkpoint.json is missing"):
        call(train, "--preset", "smoke", "--epochs", "5", "--out", run)
    content = checkpoint.read(run / "checkpoints" / "last")
    with pytest.raises(UserError, match="papers would be replaced by a checkpoint, but holds something else"):
        checkpoint.write(run / "checkpoints" / "best", content)
    assert (tmp_path / "papers" / "thesis.tex").read_text() == "x"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("which", ["checkpoints", "checkpoints/last", "checkpoints/best"])
@pytest.mark.parametrize("instead", ["link to nowhere", "link to itself", "file", "empty folder of another disk"])
def test_missing_disks_do_not_start_a_run_anew(which: str, instead: str, run: Path, tmp_path: Path, call: Call) -> None:
    shutil.move(run / which, tmp_path / "unmounted")
    if instead == "file":
        (run / which).write_bytes(b"")
    else:
        (run / which).symlink_to(run / which if "itself" in instead else tmp_path / "disk")
    if "empty" in instead:
        (tmp_path / "disk").mkdir()
    before = snapshot(run)
    refused = "is not a folder" if "empty" not in instead else "where there is no checkpoint, but"
    for command in [(train, "--preset", "smoke", "--epochs", "5", "--out", run), (evaluate, run)]:
        if command[0] is evaluate and "empty" in instead:
            continue
        with pytest.raises(UserError, match=refused) as error:
            call(*command)
        assert "\n" not in str(error.value) and str(run / which) in str(error.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["samples", "tensorboard", ".lock"])
def test_links_in_circles_are_named(name: str, run: Path, call: Call) -> None:
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(name)
    with pytest.raises(UserError, match=rf"/{name} is a link[ ,].*; (mount|delete)"):
        call(train, "--preset", "smoke", "--epochs", "5", "--out", run)


def test_nothing_is_removed_beside_a_folder_that_holds_no_checkpoint(run: Path, tmp_path: Path, call: Call) -> None:
    for name in ("docs", ".docs-new", ".docs-previous"):
        (tmp_path / "victim" / name).mkdir(parents=True)
        (tmp_path / "victim" / name / "thesis.tex").write_text("x")
    shutil.rmtree(run / "checkpoints" / "best")
    (run / "checkpoints" / "best").symlink_to(tmp_path / "victim" / "docs")
    before = snapshot(tmp_path / "victim")
    with pytest.raises(UserError, match="missing"):
        call(train, "--preset", "smoke", "--epochs", "5", "--out", run)
    content = checkpoint.read(run / "checkpoints" / "last")
    (tmp_path / "victim" / "docs" / "thesis.tex").unlink()
    with pytest.raises(UserError, match=r"\.docs-new is where a checkpoint is written; move it away"):
        checkpoint.write(run / "checkpoints" / "best", content)
    assert snapshot(tmp_path / "victim").items() <= before.items() and len(snapshot(tmp_path / "victim")) == 2


# -- kills between two writes ---------------------------------------------------------------------------------------------


def test_what_a_kill_leaves_beside_checkpoints_is_removed(run: Path, call: Call) -> None:
    checkpoints = run / "checkpoints"
    for name in (".last-previous", ".best-previous", ".last-new"):
        shutil.copytree(checkpoints / "last", checkpoints / name)
    call(train, "--preset", "smoke", "--out", run)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "last"]


def test_the_last_score_is_not_logged_before_its_checkpoint_is_saved(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it saves the best checkpoint at the end of training scores again when it goes on."""
    arguments = ["--preset", "smoke", "--epochs", "1", "--score.every", "2"]  # so the only score is that at the end
    call(train, *arguments, "--out", tmp_path / "whole")
    write = checkpoint.write
    monkeypatch.setattr(
        checkpoint, "write", lambda folder, content: 1 / (folder.name != "best") and write(folder, content)
    )
    with pytest.raises(ZeroDivisionError):
        call(train, *arguments, "--out", tmp_path / "killed")
    monkeypatch.undo()
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "cache"))
    call(train, *arguments, "--out", tmp_path / "killed")
    whole, killed = (checkpoint.read(tmp_path / name / "checkpoints" / "best") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed.weights[name]) for name, value in whole.weights.items())


@pytest.mark.usefixtures("curves")
def test_a_report_that_a_kill_prevented_is_written_by_the_same_command(run: Path, call: Call) -> None:
    report.write(run)
    whole = (run / "report.html").read_text()
    (run / "report.html").write_text("without scores")
    call(train, "--preset", "smoke", "--out", run)
    assert (run / "report.html").read_text() == whole


def test_pictures_that_a_kill_prevented_are_drawn_by_the_same_command(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--preset", "smoke", "--epochs", "1", "--score.samples", "20", "--out", tmp_path / "run"]
    save, kinds = pictures.save_png, {"samples", "reconstructions", "interpolations"}
    for first in range(1, 4):

        def dies(path: Path, picture: torch.Tensor, scale: int, *, after: list[int] = [first]) -> None:  # noqa: B006
            if not after[0]:
                raise ZeroDivisionError
            after[0] -= 1
            save(path, picture, scale)

        monkeypatch.setattr(pictures, "save_png", dies)
        with contextlib.suppress(ZeroDivisionError):
            call(train, *arguments)
        monkeypatch.setattr(pictures, "save_png", save)
        call(train, *arguments)
        assert kinds <= {path.name for path in (tmp_path / "run").iterdir()}
        shutil.rmtree(tmp_path / "run")
