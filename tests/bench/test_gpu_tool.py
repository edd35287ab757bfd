"""`make gpu` as a tool: what it does when it is interrupted, when nothing can be installed, and what it writes then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.results import write

ROOT = Path(__file__).parents[2]
TOOL = """
import sys
sys.argv[0] = "tools/gpu.py"
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("gpu_tool", "tools/gpu.py")
tool = importlib.util.module_from_spec(spec)
sys.modules["gpu_tool"] = tool
spec.loader.exec_module(tool)
tool.WORK = Path({work!r})
tool.steps = lambda *_: [tool.Step(name, [sys.executable, "-c", code], 60) for name, code in {steps!r}]
tool.main()
"""


def start(folder: Path, steps: list[tuple[str, str]], *options: str) -> subprocess.Popen:
    """`tools/gpu.py` with these steps, in Python, in the place of its own."""
    program = TOOL.format(work=str(folder / "work"), steps=steps)
    command = [sys.executable, "-c", program, "--rehearse", "--out", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def states(folder: Path) -> dict[str, str]:
    """How the steps ended."""
    return {row["step"]: row["state"] for row in json.loads((folder / "steps.json").read_text())}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_step_and_all_results(how: int, tmp_path, made) -> None:
    measured = made({("flow", "a", "train"): {"glf_fast": [1.0], "eager": [2.0]}})
    for r in measured.results:
        r.info |= {"batch": 1, "threads": 1, "matrix_gflops": 1.0, "yardstick_s": 1.0, "gflops": 1.0}
    write(measured, tmp_path / "made.json")
    copy = f"import shutil; shutil.copy({str(tmp_path / 'made.json')!r}, {str(tmp_path / 'gpu.json')!r})"
    started = tmp_path / "started"
    endless = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(77)"
    run = start(tmp_path, [("bench-a", copy), ("bench-b", endless), ("bench-c", "pass")])
    end = time.monotonic() + 60
    while not (started.is_file() and started.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(how)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 130, printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert states(tmp_path) == {"bench-a": "ok", "bench-b": "stopped: interrupted"}
    assert "==== bench-b: stopped: interrupted ====" in (tmp_path / "log.txt").read_text()
    assert "### a, train" in (tmp_path / "tables.md").read_text()


def test_what_cannot_be_installed_costs_only_what_needs_it(tmp_path) -> None:
    """pip refuses: the packages that it would map are where Python looks for them, as long as the run lasts."""
    look = "import pathlib; assert pathlib.Path('glf_fast/kernels/coupling_flow.py').is_file()"
    tests = "import sys; sys.exit(3)"
    tell = f"import os, pathlib; pathlib.Path({str(tmp_path / 'tests')!r}).write_text(os.environ['TESTS'])"
    names = [("build", "import sys; sys.exit('pip refuses')"), ("tests", tests), ("bench-a", look), ("bench-b", tell)]
    run = start(tmp_path, names)
    printed, _ = run.communicate(timeout=60)
    assert states(tmp_path) == {"build": "failed with 1", "tests": "failed with 3", "bench-a": "ok", "bench-b": "ok"}, (
        printed
    )
    assert (tmp_path / "tests").read_text() == "failed with 3"
    assert not (ROOT / "glf_fast" / "kernels").exists() and not (ROOT / "glf_fast" / "cuda").exists()


def test_only_some_steps_are_still_prepared(tmp_path) -> None:
    names = [("wheels", ""), ("build", ""), ("tests", ""), ("bench-a", ""), ("bench-b", "")]
    start(tmp_path, names, "--only", "bench-b").communicate(timeout=60)
    assert list(states(tmp_path)) == ["wheels", "build", "bench-b"]


def test_without_an_installation_the_kernels_are_found(tool, tmp_path) -> None:
    """A Python that knows torch, and glf_fast only as the folder that it is in."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("glf_fast", "kernels", "csrc"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(checkout)], check=True)
    for library in (checkout / "glf_fast").glob("*.so"):
        library.unlink()
    tool.ROOT = checkout
    code = (
        "import sys; sys.path.insert(0, '.'); import glf_fast.kernels.coupling_flow, glf_fast; print(glf_fast.__file__)"
    )
    with tool.linked():
        # -S: no site-packages but those named, and so no editable installation.
        site = [path for path in sys.path if path.endswith("-packages")]
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(site)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(checkout / "glf_fast" / "__init__.py")


def test_a_report_that_fails_says_so(tool, tmp_path, monkeypatch) -> None:
    (tmp_path / "gpu.json").write_text('{"machine": {}')
    assert "tables.md is not whole" in tool.tables(tmp_path, dict(os.environ))


def test_a_step_that_hears_nothing_is_killed_in_time(tool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "WORK", tmp_path)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(77)"
    command = [sys.executable, "-c", deaf]
    processes = [tool._start(command, tmp_path / f"{i}.log", dict(os.environ)) for i in range(2)]
    end = time.monotonic() + 30
    while not all((tmp_path / f"{i}.log").read_text() for i in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    began = time.monotonic()
    tool._stop(processes)
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2
    assert time.monotonic() - began < 14  # both together, not one after the other
