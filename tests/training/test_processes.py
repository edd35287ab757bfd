"""Commands under torchrun: one run, whatever the number of processes, and one line where one of them is missing."""

import contextlib
import io
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
from PIL import Image
from several_processes import (
    agreeing,
    drawing,
    failing_rows,
    fetching,
    finished,
    impatient,
    leaving,
    long_work,
    started,
)

from glf_fast import evaluate, train
from glf_fast.data import celeba
from glf_fast.errors import UserError
from glf_fast.metrics import __main__ as metrics
from glf_fast.training import checkpoint, runs

Call = Callable[..., None]
# A checkpoint after every step.
ENDLESS = ["--preset", "smoke", "--epochs", "100000", "--checkpoint-minutes", "0", "--score.every", "0"]


def steps(folder: Path) -> int:
    with contextlib.suppress(UserError):
        return checkpoint.read_state(folder / "checkpoints" / "last")["images"] // 128
    return 0


def wait_for_steps(folder: Path, count: int, children: list[forked.Child]) -> None:
    deadline = time.monotonic() + 60
    while steps(folder) < count:
        assert time.monotonic() < deadline and children[0].poll() is None, children[0].communicate(1)
        time.sleep(0.01)


def errors(children: list[forked.Child]) -> list[str]:
    """The lines of errors that processes have printed."""
    printed = "".join(child.communicate(60)[1] for child in children)
    assert "Traceback" not in printed, printed
    found = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(found) <= 1, printed
    return found


def test_a_run_is_one_run_whatever_ends_it(tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, of which one is killed; two again, which a signal stops; two, of which the first has a full disk; then
    one, which finishes; two score it."""
    folder = tmp_path / "r"
    with started(2, forked.command, "train", *ENDLESS, "--out", str(folder)) as children:
        wait_for_steps(folder, 3, children)
        children[1].send_signal(signal.SIGKILL)
        [line] = errors(children[:1])
        assert line.startswith("error: another process of this job has ended; run the same command again")
        assert children[0].returncode == 2
    before = steps(folder)
    with started(2, forked.command, "train", *ENDLESS, "--out", str(folder)) as children:
        wait_for_steps(folder, before + 3, children)
        for child in children:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGTERM)  # as Slurm and torchrun both do
        assert not errors(children)
        assert [child.returncode for child in children] == [128 + signal.SIGTERM] * 2
        assert "run the same command again to resume" in children[0].communicate()[1]
        assert children[1].communicate() == ("", "")
    images = [record["images"] for record in runs.read_metrics(folder)]
    assert images == sorted(set(images)) and images[-1] == 128 * steps(folder)
    before = steps(folder)
    size = max(path.stat().st_size for path in (folder / "checkpoints" / "last").iterdir())
    with started(2, forked.command, "train", *ENDLESS, "--out", str(folder), file_size=size - 1) as children:
        [line] = errors(children)
        assert "could not be written" in line and "free disk space and run the same command again" in line
        assert [child.returncode for child in children] == [2, 2] and steps(folder) == before

    epochs = steps(folder) // 12 + 1
    small = [*ENDLESS[:2], "--score.every", "0", "--epochs", str(epochs), "--out", str(folder)]
    call(train, *small)
    assert steps(folder) == 12 * epochs
    # Three chunks of samples, and fewer reconstructions than one chunk.
    capsys.readouterr()
    more = ["--n", "1100", "--scores", "fd,kid,pr,is,msssim,modes,nearest"]
    call(evaluate, folder, *more)
    text, one = capsys.readouterr().out, runs.read_scores(folder)
    [(printed, _), nothing] = finished(2, forked.command, "evaluate", str(folder), *more)
    assert nothing == ("", "") and printed == text
    assert len(one) == 2 and _close(runs.read_scores(folder), one)
    assert {number["score"] for number in one[-1]["battery"]} == {"is", "msssim", "modes", "nearest"}


def _close(a: object, b: object) -> bool:
    """Whether JSON-ready values are equal, to rounding."""
    if isinstance(a, float) or isinstance(b, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-6)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_close, a, b))
    return a == b


def test_distances_are_those_of_one_process(call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["calc", "digits:train", "digits:test", "--extractor", "tiny"]
    call(metrics, *arguments)
    [(printed, _), nothing] = finished(2, forked.command, "metrics.__main__", *arguments)
    assert nothing == ("", "") and printed == capsys.readouterr().out


def test_samples_of_all_processes_that_are_not_finite_are_counted() -> None:
    [(_, told), nothing] = finished(2, drawing, 400)
    assert told == "100 of 1000 samples are not finite and have black pixels\n" and nothing == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "127"], "batch_size = 127, the images of a step of all processes together, does not divide"),
        (["--flow.activation", "foo"], "foo"),
    ],
)
def test_an_error_of_all_processes_is_printed_once(arguments: list[str], message: str, tmp_path: Path) -> None:
    with started(2, forked.command, "train", "--preset", "smoke", *arguments, "--out", str(tmp_path / "r")) as children:
        [line] = errors(children)
        assert message in line and [child.returncode for child in children] == [2, 2]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("first", "noted", "message"),
    [(0, 3, "not enough memory"), (4, 0, "error: wrong"), (5, 0, "error: wrong"), (6, 0, "not enough memory")],
)
def test_a_comparison_goes_on_after_errors_of_all_processes_alone(first: int, noted: int, message: str) -> None:
    with started(2, failing_rows, first) as children:
        [line] = errors(children)
        assert message in line and [child.returncode for child in children] == [2, 2]
        assert children[0].communicate()[0].count("after ") == noted


def test_the_same_checkpoint_is_waited_for_and_another_one_is_an_error(tmp_path: Path) -> None:
    """As of a file system that shows a machine late what another one has written, and of folders that are not shared."""
    for name in ("0", "1"):
        (tmp_path / name / "last").mkdir(parents=True)
        (tmp_path / name / "last" / "checkpoint.json").write_text(name)
    with started(2, agreeing, tmp_path) as children:
        [line] = errors(children)
        assert "the processes do not find the same checkpoint in last; choose a folder that all machines share" in line
        assert children[0].communicate()[0] == "the same\n" and [child.returncode for child in children] == [2, 2]


@pytest.mark.parametrize("command", ["sample", "fit", "info", "data.__main__"])
def test_a_command_of_one_process_does_its_work_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, f"glf_fast.{command}", raising=False)  # so that runpy is the first to import it
    told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for rank, error in (("0", "error: this command runs in one process; start it without torchrun\n"), ("1", "")):
        for name, value in {**told, "RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module(f"glf_fast.{command}", run_name="__main__", alter_sys=True)
        assert capsys.readouterr() == ("", error)


def celeba_of_six(folder: Path) -> None:
    """Write the files of CelebA with 4 training and 2 test images."""
    content = io.BytesIO()
    Image.new("RGB", (178, 218), "red").save(content, "PNG")
    with zipfile.ZipFile(folder / celeba.ARCHIVE, "w") as archive:
        for i in range(6):
            archive.writestr(f"img_align_celeba/{i:06}.jpg", content.getvalue())
    rows = [f"{i:06}.jpg {number}\n" for i, number in enumerate((0, 0, 0, 0, 2, 2))]
    (folder / celeba.PARTITION).write_text("".join(rows))


@pytest.mark.parametrize("machines", [1, 2])
def test_data_are_fetched_and_decoded_once_on_a_machine_however_long_it_takes(machines: int, tmp_path: Path) -> None:
    """In longer than processes wait for each other. The second of two machines begins when the first has its files."""
    celeba_of_six(tmp_path)
    if machines > 1:
        shutil.copytree(tmp_path, tmp_path / "cache of 0" / "data" / "celeba")
    finished(2, fetching, tmp_path, machines)
    done = (tmp_path / "notes.txt").read_text().split()
    assert sorted(done) == sorted(["fetched", *["decoded"] * (2 * machines)])


def test_the_work_of_process_0_may_take_longer_than_the_others_wait() -> None:
    finished(2, long_work)


def test_a_signal_ends_no_process_group_that_a_model_still_uses() -> None:
    """Gradients are averaged by an object that may wait for ever when it is freed after its group."""
    assert finished(2, leaving) == [("freed\n", "")] * 2


def test_a_process_that_ends_while_it_fetches_ends_the_others(tmp_path: Path) -> None:
    celeba_of_six(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "cache of 0" / "data" / "celeba")
    with started(2, fetching, tmp_path, 2) as children:
        deadline = time.monotonic() + 60
        while not (tmp_path / "notes.txt").is_file() or "fetched" not in (tmp_path / "notes.txt").read_text():
            assert time.monotonic() < deadline and children[1].poll() is None, children[1].communicate(1)
            time.sleep(0.01)
        children[1].send_signal(signal.SIGKILL)
        [line] = errors(children[:1])
        assert "another process of this job did not answer for 1 seconds" in line and children[0].returncode == 2


def test_a_process_that_does_not_answer_ends_the_others_after_a_time(tmp_path: Path) -> None:
    """In one line for all of them. Before it, that communication takes more than half of a step is said once."""
    folder = tmp_path / "r"
    command = ["train", *ENDLESS, "--batch-size", "126", "--out", str(folder)]
    with started(3, impatient, 3, *command) as children:
        wait_for_steps(folder, 2, children)
        children[2].send_signal(signal.SIGSTOP)
        [line] = errors(children[:2])
        assert children[0].communicate()[1].count("communication takes 100% of a step") == 1
        assert "another process of this job did not answer for 3 seconds" in line
        assert [child.returncode for child in children[:2]] == [2, 2]
    with started(2, impatient, 2, *command) as children:
        children[1].send_signal(signal.SIGKILL)
        [line] = errors(children[:1])
        assert "the 2 processes did not come together" in line or "has ended" in line


@contextlib.contextmanager
def torchrun(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`torchrun …`, with its processes, which only it can end."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        try:
            yield agent
        finally:
            if agent.poll() is None:
                agent.terminate()
                agent.wait(60)


FRAGILE = """
import os, signal, sys
from glf_fast import train
from glf_fast.errors import run_command
from glf_fast.training.trainer import Trainer
step = Trainer.step
def fragile(self, *batch):
    if self.images == 378 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *batch)
Trainer.step = fragile
run_command(train.main)
"""


@pytest.mark.long
@pytest.mark.timeout(1300)
def test_torchrun_starts_killed_processes_again_and_any_number_on_two_machines_resumes(tmp_path: Path) -> None:
    """One process of two kills itself in its third step, once; three, which two torchruns start, finish what two have begun."""
    folder = tmp_path / "r"
    (tmp_path / "fragile.py").write_text(FRAGILE)
    base = ["--preset", "smoke", "--batch-size", "126", "--checkpoint-minutes", "0", "--score.every", "0"]
    one_epoch = [*base, "--epochs", "1", "--out", folder]
    with torchrun("--nproc-per-node", 2, "--max-restarts", 1, tmp_path / "fragile.py", *one_epoch) as agent:
        _, told = agent.communicate(timeout=600)
        assert agent.returncode == 0, told
    assert checkpoint.read_state(folder / "checkpoints" / "last")["images"] == 12 * 126
    assert told.count("error: another process of this job has ended") == 1
    assert "resuming after 378 images" in told

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    together = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", at, "--local-addr", "127.0.0.1"]
    command = ["-m", "glf_fast.train", "--", *base, "--epochs", "2", "--out", folder]
    with (
        torchrun(*together, "--nproc-per-node", 2, *command) as first,
        torchrun(*together, "--nproc-per-node", 1, *command) as second,
    ):
        told = "".join(agent.communicate(timeout=600)[1] for agent in (first, second))
        assert (first.returncode, second.returncode) == (0, 0), told
    assert checkpoint.read_state(folder / "checkpoints" / "last")["images"] == 2 * 12 * 126
    assert told.count("3 processes, each with 42 of the 126 images") == told.count("resuming after 1,512 images") == 1
