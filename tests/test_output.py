"""Commands on terminals, pipes and machines as they are: encodings, readers that go away, narrow windows, little memory."""

import io
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from glf_fast.errors import run_command
from glf_fast.output import Output, one_line


def shell(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A shell's command, in which PYTHON is this interpreter."""
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True, timeout=60)


def test_a_terminal_without_our_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    for command, text in (
        (["data.__main__", "info", "digits"], "licence   BSD-3-Clause"),
        (["train", "--help"], "cpu, cuda, cuda:1, ?;"),
    ):
        done = forked.ended(forked.command, *command)
        assert done.returncode == 0 and not done.stderr and text in done.stdout


def test_a_narrow_window_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    for command in ("sample", "train"):
        assert forked.ended(forked.command, command, "--help").returncode == 0


def test_closed_streams_and_readers_that_go_away() -> None:
    done = shell(
        "$PYTHON -m glf_fast.data list 2>&- | wc -l;"
        " $PYTHON -m glf_fast.train --help | true; echo ${PIPESTATUS[0]};"
        " ($PYTHON -m glf_fast.train --preset smoke --dry-run --model.hiden 3 3>&1 1>&2 2>&3) | true; echo ${PIPESTATUS[0]}"
    )
    lines = done.stdout.split("\n")
    assert int(lines[0]) > 5
    assert lines[1:3] == ["141", "2"] and not done.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: there is not enough memory for this (MemoryError); make"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: you tried to allocate 4000 bytes."
            ),
            "error: there is not enough memory for this (allocate 4000 bytes); make",
        ),
        (
            OSError(28, "No space left on device", "new\nline\x1b[31m.png"),
            r"error: [Errno 28] No space left on device: 'new\n",
        ),
    ],
)
def test_the_systems_errors_are_one_line(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        with pytest.raises(SystemExit) as stop:
            run_command(main)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(message) and printed.count("\n") == 1


def test_bugs_keep_their_traceback() -> None:
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        run_command(main)


def test_names_cannot_command_a_terminal() -> None:
    assert one_line("a\nb\x1b[31m\u202ec\udcff ×") == r"a b\u001b[31m\u202ec\udcff ×"


def test_printed_names_cannot_command_a_terminal_either() -> None:
    stream = io.StringIO()
    print("a\x1b[31m\u202eb\xa0\U000e0001\tc\r", file=Output(stream))
    assert stream.getvalue() == "a\\u001b[31m\\u202eb\\u00a0\\U000e0001\\u0009c\\u000d\n"


@pytest.mark.parametrize(
    ("variable", "value", "wanted"), [("BACKEND", "cdua", "'cpp'"), ("BACKEND", "cuda", ""), ("ISA", "mmx", "'avx2'")]
)
def test_a_wrong_environment_is_one_line(
    variable: str, value: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command has one; a program that imports the package gets an exception."""
    if value == "cuda" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    monkeypatch.setenv(f"GLF_FAST_{variable}", value)
    told = forked.fresh(
        "import sys; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'glf_fast.data']; import glf_fast"
    )
    check_one_line(told.returncode, told.stderr, variable, wanted)
    raised = forked.fresh("import glf_fast")
    assert raised.returncode == 1 and "Traceback" in raised.stderr


def test_a_wrong_environment_is_one_line_in_the_shell() -> None:
    for command in ("$PYTHON -m glf_fast.data list", "$PYTHON -mglf_fast.train --help"):
        done = shell(command, GLF_FAST_ISA="mmx")
        check_one_line(done.returncode, done.stderr, "ISA", "'avx2'")
    done = shell("$PYTHON -c 'import glf_fast' -m glf_fast.train", GLF_FAST_ISA="mmx")
    assert done.returncode == 1 and "Traceback" in done.stderr


def check_one_line(status: int, stderr: str, variable: str, wanted: str) -> None:
    assert status == 2 and stderr.count("\n") == 1 and wanted in stderr
    assert stderr.startswith(f"error: $GLF_FAST_{variable} ")
    assert stderr.endswith("to another value, or unset it\n")


def test_a_cache_folder_without_a_place_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLF_FAST_CACHE", "~nosuchuser/x")
    done = forked.ended(forked.command, "data.__main__", "info", "mnist")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "set GLF_FAST_CACHE to a folder" in done.stderr


def test_little_memory_is_one_line(tmp_path: Path) -> None:
    done = shell(
        "ulimit -v 8000000; $PYTHON -m glf_fast.train --preset smoke --model.hidden 1000000000 --dry-run --device cpu"
    )
    assert done.returncode == 2 and "not enough memory" in done.stderr.splitlines()[-1], done.stderr
