"""Commands under torchrun: one run, whatever the number of processes, and one line where one of them is missing."""

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from PIL import Image
from several_processes import drawing, failing_rows, fetching, finished, impatient, started

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
    """Two processes, of which one is killed; two again, which a signal stops; then one, which finishes; two score it."""
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
    folder = tmp_path / "r"
    with started(2, impatient, 3, "train", *ENDLESS, "--out", str(folder)) as children:
        wait_for_steps(folder, 1, children)
        children[1].send_signal(signal.SIGSTOP)
        [line] = errors(children[:1])
        assert "another process of this job did not answer for 3 seconds" in line and children[0].returncode == 2
    with started(2, impatient, 2, "train", *ENDLESS, "--out", str(folder)) as children:
        children[1].send_signal(signal.SIGKILL)
        [line] = errors(children[:1])
        assert "the 2 processes did not come together" in line or "has ended" in line


@pytest.mark.long
def test_torchrun_starts_killed_processes_again_and_any_number_resumes(tmp_path: Path) -> None:
    """One process of two kills itself in its third step, once; three finish what two have begun."""
    folder = tmp_path / "r"
    (tmp_path / "fragile.py").write_text(
        "import os, signal, sys\n"
        "from glf_fast import train\n"
        "from glf_fast.errors import run_command\n"
        "from glf_fast.training.trainer import Trainer\n"
        "step = Trainer.step\n"
        "def fragile(self, *batch):\n"
        "    if self.images == 378 and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *batch)\n"
        "Trainer.step = fragile\n"
        "run_command(train.main)\n"
    )
    base = ["--preset", "smoke", "--batch-size", "126", "--checkpoint-minutes", "0", "--score.every", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    for count, script, epochs in ((2, "fragile.py", 1), (3, "plain.py", 2)):
        (tmp_path / "plain.py").write_text(
            (tmp_path / "fragile.py").read_text().replace("Trainer.step = fragile\n", "")
        )
        command = [*torchrun, str(count), "--max-restarts", "1", str(tmp_path / script), *base, "--epochs", str(epochs)]
        done = subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert checkpoint.read_state(folder / "checkpoints" / "last")["images"] == epochs * 12 * 126
        assert done.stderr.count("error: another process of this job has ended") == (count == 2)
        assert ("resuming after 378 images" in done.stderr) == (count == 2)
