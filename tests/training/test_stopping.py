"""Runs that are killed, stopped, resumed, or that something goes wrong with."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glf_fast import evaluate, sample, train
from glf_fast.errors import UserError
from glf_fast.training import checkpoint, runs

Call = Callable[..., None]
Start = Callable[..., forked.Child]


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# -- stopping and going on ------------------------------------------------------------------------------------------------

# A checkpoint after every step, twelve in an epoch.
LONG = [
    "--preset",
    "smoke",
    "--epochs",
    "3",
    "--checkpoint-minutes",
    "0",
    "--score.every",
    "1",
    "--pictures-every",
    "1",
]


def wait_for_images(folder: Path, images: int, process: forked.Child) -> None:
    """Until the run's last checkpoint has seen so many images."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if checkpoint.read_state(folder / "checkpoints" / "last")["images"] >= images:
                return
        except UserError:  # not there yet, or replaced while being read
            pass
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    raise AssertionError(f"no checkpoint with {images} images: {process.communicate()}")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, command: Start, call: Call) -> None:
    """Killed twice, in the middle of epochs, with kill -9; against a run that nobody disturbed, in this process."""
    call(train, *LONG, "--out", tmp_path / "whole")
    for images in (600, 2_000):
        killed = command("train", *LONG, "--out", tmp_path / "killed")
        wait_for_images(tmp_path / "killed", images, killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert not any(record.get("finished") for record in runs.read_metrics(tmp_path / "killed"))
    last = command("train", *LONG, "--out", tmp_path / "killed")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    for name in ("last/model", "last/training", "best/model"):
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / f"{name}.safetensors") for run in ("whole", "killed")
        )
        assert ours.keys() == theirs.keys() and len(ours) > 10
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    scores = [[r for r in lines(tmp_path / run) if "score" in r] for run in ("whole", "killed")]
    assert scores[0] == scores[1] and len(scores[0]) == 3
    pictures = [sorted((tmp_path / run / "samples").iterdir()) for run in ("whole", "killed")]
    assert [path.read_bytes() for path in pictures[0]] == [path.read_bytes() for path in pictures[1]]
    seen = [record["images"] for record in lines(tmp_path / "killed")]
    assert seen == sorted(seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, command: Start, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    rarely = ["--score.every", "0", "--pictures-every", "99999", "--checkpoint-minutes", "0.001"]
    process = command("train", *LONG[:2], "--epochs", "100000", *rarely, "--out", tmp_path / "r")
    wait_for_images(tmp_path / "r", 1, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "run the same command again to resume" in errors and "Traceback" not in errors
    images = checkpoint.read_state(tmp_path / "r" / "checkpoints" / "last")["images"]
    assert f"stopped after {images:,} images" in errors
    assert lines(tmp_path / "r")[-1]["images"] == images
    assert (tmp_path / "r" / "report.html").is_file() and list((tmp_path / "r" / "samples").iterdir())
    # It has no best checkpoint yet; the last one can be looked at.
    call(sample, tmp_path / "r", "--n", "4", "--out", tmp_path / "four.png")
    assert "no best checkpoint yet" in capsys.readouterr().err and (tmp_path / "four.png").is_file()


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, command: Start) -> None:
    arguments = [*LONG[:2], "--epochs", "100000", "--checkpoint-minutes", "0.001", "--out", tmp_path / "r"]
    first = command("train", *arguments)
    wait_for_images(tmp_path / "r", 1, first)
    second = command("train", *arguments)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2 and f"another process is training in {tmp_path / 'r'}" in errors
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("setting", ["--flow.activation foo", "--batch-size 100000", "--flow.log-scale-constant 0"])
def test_a_refused_command_leaves_nothing_behind(setting: str, tmp_path: Path, call: Call) -> None:
    with pytest.raises(UserError):
        call(train, "--preset", "smoke", "--out", tmp_path / "r", *setting.split())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("n", [2, 10])
def test_too_few_images_are_refused_before_training(n: int, tmp_path: Path, call: Call) -> None:
    np.save(tmp_path / "few.npy", np.zeros((n, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"few.npy has \d (test|train) items; at least \d are needed"):
        call(train, "--preset", "smoke", "--data.source", tmp_path / "few.npy", "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_splits_of_different_shapes_are_refused_before_training(tmp_path: Path, call: Call) -> None:
    grey, coloured = np.zeros((200, 8, 8, 1), np.uint8), np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "unlike.npz", train=grey, test=coloured)
    with pytest.raises(UserError, match=r"training items of shape \(1, 8, 8\) and test items of shape \(3, 8, 8\)"):
        call(train, "--preset", "smoke", "--data.source", tmp_path / "unlike.npz", "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scores.json", "[{}]"),
        ("checkpoints/last/checkpoint.json", '{"format": 1, "model": "glf", "state": {}, "files": []}'),
    ],
)
def test_json_of_another_shape_is_named(file: str, content: str, run: Path, call: Call) -> None:
    (run / file).write_text(content)
    with pytest.raises(UserError, match=file.split("/")[-1].replace(".", r"\.")):
        call(train, "--preset", "smoke", "--out", run, "--epochs", "5")


def test_a_log_cut_off_in_a_line_does_not_stop_a_resume(run: Path, call: Call) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"images": 61')
    call(train, "--preset", "smoke", "--out", run, "--epochs", "5")
    assert lines(run)[-1]["images"] == 5 * 12 * 128


def test_changed_images_are_noticed(tmp_path: Path, call: Call) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "own.npy", images)
    arguments = [
        "--preset",
        "smoke",
        "--data.source",
        tmp_path / "own.npy",
        "--out",
        tmp_path / "r",
        "--score.samples",
        "20",
    ]
    call(train, *arguments, "--epochs", "1")
    np.save(tmp_path / "own.npy", images[::-1])
    with pytest.raises(UserError, match="was trained on other data"):
        call(train, *arguments, "--epochs", "2")


# -- when things go wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_explodes_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, command: Start) -> None:
    folder = tmp_path / "r"
    process = command("train", *LONG, "--out", folder, "--flow-optimizer.lr", "30", "--flow.log-scale", "exp")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    message = errors.splitlines()[-1]
    assert re.search(r"not finite (at step \d+ \(\d+ images\)|after \d+ images)", message), errors
    assert str(folder / "checkpoints" / "last") in message and "lower the learning rates" in message
    saved = checkpoint.read(folder / "checkpoints" / "last", training=True)
    assert saved.state["images"] >= 128
    assert all(value.isfinite().all() for value in [*saved.weights.values(), *saved.training.values()])


def test_a_full_disk_stops_in_one_line_and_the_same_command_goes_on(run: Path, tmp_path: Path, command: Start) -> None:
    """A real failure: the system limits every file of the process to 100 kB, less than training.safetensors."""
    arguments = ["--preset", "smoke", "--out", str(run), "--epochs", "5"]
    before = (run / "checkpoints" / "last" / "training.safetensors").read_bytes()
    limited = command("train", *arguments, file_size=100_000)
    _, errors = limited.communicate()
    assert limited.returncode == 2
    message = errors.splitlines()[-1]
    assert message.startswith(f"error: {run}/checkpoints/last could not be written") and "File too large" in message
    assert (run / "checkpoints" / "last" / "training.safetensors").read_bytes() == before
    process = command("train", *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert lines(run)[-1]["images"] == 5 * 12 * 128


def test_a_corrupt_checkpoint_stops_every_command_in_one_line(run: Path, call: Call) -> None:
    for which, arguments in (("last", ["--epochs", "5"]), ("best", [])):
        file = run / "checkpoints" / which / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
        modules = [(train, ["--preset", "smoke", "--out", run, *arguments])] if which == "last" else []
        modules += [(module, [run, "--checkpoint", which]) for module in (sample, evaluate)]
        for module, options in modules:
            with pytest.raises(UserError, match=r"model.safetensors is corrupt: its size or SHA-256"):
                call(module, *options)


def test_a_missing_data_set_and_a_run_that_is_none_are_named(tmp_path: Path, call: Call) -> None:
    with pytest.raises(UserError, match="nowhere"):
        call(train, "--preset", "smoke", "--data.source", tmp_path / "nowhere", "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()
    for module in (sample, evaluate):
        with pytest.raises(UserError, match="not a run's folder"):
            call(module, tmp_path)


def test_errors_reach_the_shell_as_one_line(process: Callable[..., subprocess.Popen[str]]) -> None:
    done = process("train", "--preset", "quik")
    output, errors = done.communicate()
    assert done.returncode == 2 and output == ""
    assert re.fullmatch(r"error: no preset 'quik'; did you mean 'quick'\? the presets are .*\n", errors)
