"""`make gpu` as a tool: what it does and writes when it is interrupted, and when a step fails, dies or takes too long."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest

from bench.results import write

ROOT = Path(__file__).parents[2]
# The tool's own main, on a machine that says it has a GPU, with steps of the test's.
TOOL = """
import sys
sys.path.insert(0, "tools")
import gpu, gpu_steps
from pathlib import Path
work = Path({work!r})
gpu_steps.WORK, gpu_steps.SITE, gpu_steps.MARGIN = work, work / "site", 0
gpu.WORK, gpu.FIRST, gpu.TABLE = work, work / "first", work / "launch_table.json"
gpu.torch.cuda.is_available = lambda: True
steps = [
    gpu.Step(name, [sys.executable, "-c", code, *how.pop("arguments", [])], **how) for name, code, how in {steps!r}
]
gpu.Call.first = gpu.Call.second = lambda self: iter(steps)
sys.argv = ["tools/gpu.py", *{options!r}]
gpu.main()
"""


def program(folder: Path, steps: list[tuple], *options: str) -> str:
    """`tools/gpu.py` with these steps in the place of its own: name, Python, and what else a Step takes."""
    made = [(name, code, {"seconds": 60, **(how[0] if how else {})}) for name, code, *how in steps]
    return TOOL.format(work=str(folder / "work"), steps=made, options=["--out", str(folder), *options])


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., forked.Child]]:
    """Start it with these steps, in a process of its own."""
    monkeypatch.chdir(ROOT)
    with contextlib.ExitStack() as stack:
        yield lambda *given: stack.enter_context(
            contextlib.closing(forked.Child(forked.program, program(tmp_path, *given)))
        )


def states(folder: Path) -> dict[str, str]:
    """How the steps ended."""
    return {row["step"]: row["state"] for row in json.loads((folder / "steps.json").read_text())}


@pytest.fixture
def measured(tmp_path, made) -> str:
    """Python that writes a result file."""
    results = made({("flow", "a", "train"): {"glf_fast": [1.0], "eager": [2.0]}})
    for r in results.results:
        r.info |= {"batch": 1, "threads": 1, "matrix_gflops": 1.0, "yardstick_s": 1.0, "gflops": 1.0}
    write(results, tmp_path / "made.json")
    return f"import shutil; shutil.copy({str(tmp_path / 'made.json')!r}, {str(tmp_path / 'gpu.json')!r})"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_call_leaves_no_step_and_all_results(how: int, tmp_path, measured, start) -> None:
    started = tmp_path / "started"
    endless = f"import os, pathlib, time; pathlib.Path({str(started)!r}).write_text(str(os.getpid())); time.sleep(77)"
    run = start([("measure", measured), ("profile", endless), ("train", "pass")])
    end = time.monotonic() + 60
    while not (started.is_file() and started.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(how)
    printed = "".join(run.communicate(timeout=60))
    assert run.returncode == 130, printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert states(tmp_path) == {"measure": "ok", "profile": "stopped: interrupted"}
    assert "==== profile: stopped: interrupted ====" in (tmp_path / "log.txt").read_text()
    assert "### a, train" in (tmp_path / "tables.md").read_text()
    kept = tmp_path / "work" / "first"  # what a second call looks at
    assert {path.name for path in kept.iterdir()} == {"steps.json", "gpu.json"}


def test_a_step_that_fails_or_takes_too_long_stops_no_other(tmp_path, start) -> None:
    tell = f"import os, pathlib; pathlib.Path({str(tmp_path / 'tests')!r}).write_text(os.environ['TESTS'])"
    steps = [
        ("build", "import sys; sys.exit('no compiler')"),
        ("tests", "import sys; sys.exit(3)"),
        ("tune", "import time; time.sleep(77)", {"seconds": 5}),
        ("measure", tell),
    ]
    run = start(steps)
    printed = "".join(run.communicate(timeout=90))
    assert run.returncode == 1
    assert states(tmp_path) == {
        "build": "failed with 1", "tests": "failed with 3", "tune": "stopped: its time was over", "measure": "ok",
    }, printed  # fmt: skip
    assert (tmp_path / "tests").read_text() == "failed with 3"
    assert "not ok: build, tests, tune" in printed


def test_a_call_stops_itself_before_its_end(tmp_path, start) -> None:
    """Half a minute before, for tables; a step that would have less than five is not begun."""
    steps = [("tests", "import time; time.sleep(77)"), ("measure", "pass")]
    printed = "".join(start(steps, "--minutes", "0.53").communicate(timeout=90))
    assert states(tmp_path) == {"tests": "stopped: its time was over", "measure": "not run: out of time"}, printed
    assert sum(row["seconds"] for row in json.loads((tmp_path / "steps.json").read_text())) < 32


def test_what_lost_the_gpu_or_died_is_started_again_and_told_what_is_left(tmp_path, start) -> None:
    told = tmp_path / "told"
    code = (
        "import os, pathlib, signal, sys; path, left = sys.argv[1:]; told = pathlib.Path(path); "
        "told.open('a').write(left + ' '); n = len(told.read_text().split()); "
        "n == 1 and sys.exit(75); n == 2 and os.kill(os.getpid(), signal.SIGKILL)"
    )
    for again, state in ((True, "ok"), (False, "failed with 75")):
        told.unlink(missing_ok=True)
        how = {"seconds": 40, "again": again, "arguments": [str(told), "{seconds}"]}
        printed = "".join(start([("measure", code, how)]).communicate(timeout=90))
        assert states(tmp_path) == {"measure": state}, printed
        left = [int(seconds) for seconds in told.read_text().split()]
        assert len(left) == (3 if again else 1) and left == sorted(left, reverse=True) and 30 < left[0] <= 40


def test_only_some_steps_are_still_prepared(tmp_path, start) -> None:
    steps = [(name, "pass") for name in ("machine", "build", "tests", "measure", "profile")]
    start(steps, "--only", "profile").communicate(timeout=60)
    assert list(states(tmp_path)) == ["machine", "build", "profile"]
    printed = "".join(start(steps, "--only", "bench-flow").communicate(timeout=60))
    assert "no step bench-flow; there are machine, build" in printed


def test_without_an_installation_the_package_is_found(tmp_path) -> None:
    """By a Python that knows torch and all else, but has no glf_fast: with its kernels and its version."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in (Path(path) for path in sys.path if path.endswith("-packages")):
        for path in folder.iterdir():
            if "glf_fast" not in path.name:
                (packages / path.name).symlink_to(path)
    look = "import glf_fast.kernels.launch_table, glf_fast; print(glf_fast.__file__, glf_fast.__version__)"
    command = [sys.executable, "-S", "-c", program(tmp_path, [("info", look)])]
    own = os.environ | {"PYTHONPATH": str(packages)}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=90)
    assert states(tmp_path) == {"info": "ok"}, run.stdout + run.stderr
    assert f"{ROOT / 'glf_fast' / '__init__.py'} 0.1" in run.stdout
    assert not (ROOT / "glf_fast" / "kernels").exists() and not (ROOT / "glf_fast" / "cuda").exists()


# -- the plan --------------------------------------------------------------------------------------------------------------


def test_the_first_call_fits_its_seven_minutes(tool, tmp_path) -> None:
    """If every step that a prepared machine needs takes all that it may; the sanitizers alone may be cut."""
    planned = tool.Call(tmp_path, tmp_path / "none", tmp_path / "carry", rehearse=False)
    steps = {step.name: step for step in planned.first()}
    names = "machine build tests tune measure profile sanitize-memcheck sanitize-racecheck"
    assert list(steps) == names.split()
    sure = ("tests", "tune", "measure")
    assert 15 + sum(steps[name].seconds for name in sure) <= 60 * tool.MINUTES["first"] - tool.LAST
    assert all(steps[name].again == (name == "measure") for name in steps)
    assert len(steps["tests"].beside) == tool.COMPILERS


def test_the_second_call_begins_with_what_the_first_left(tool, tmp_path) -> None:
    ended = {"build": "failed with 1", "tests": "failed with 1", "measure": "stopped: its time was over",
             "profile": "ok", "sanitize-racecheck": "not run: out of time"}  # fmt: skip
    (tmp_path / "steps.json").write_text(json.dumps([{"step": s, "state": t, "seconds": 1} for s, t in ended.items()]))
    (tmp_path / "launch_table.json").write_text("{}")
    planned = tool.Call(tmp_path / "out", tmp_path, tmp_path / "carry", rehearse=False)
    names = [step.name for step in planned.second()]
    assert names[names.index("build") + 1 :] == [
        "table", "tests", "sanitize-racecheck", "measure", "train", "sanitize-initcheck", "sanitize-synccheck",
    ]  # fmt: skip
    measure = next(step for step in planned.second() if step.name == "measure")
    assert str(tmp_path / "gpu.json") in measure.command
    assert tool.shared(False, tmp_path)["TESTS"] == "failed with 1"
    fresh = tool.Call(tmp_path / "out", tmp_path / "nothing", tmp_path / "carry", rehearse=False)
    assert "tests" not in {step.name for step in fresh.second()}


def test_what_was_compiled_beforehand_comes_first_and_spares_the_build(tool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "WORK", tmp_path)
    (tmp_path / "carry").touch()
    steps = list(tool.Call(tmp_path, tmp_path, tmp_path / "carry", rehearse=False).first())
    assert steps[0].command[1:] == ["tools/carry.py", "unpack", str(tmp_path / "carry")]
    build = next(step for step in steps if step.name == "build")
    assert not build.unless()  # nobody has looked yet
    (tmp_path / "machine.log").write_text("to be built: cuda\n")
    assert not build.unless()
    (tmp_path / "machine.log").write_text(f"torch 2.11\n{tool.COMPLETE}\n")
    assert build.unless()


def test_a_tuned_table_is_used_where_it_is_whole(tool, tmp_path, monkeypatch) -> None:
    table, tuned = tmp_path / "kernels.json", tmp_path / "tuned.json"
    table.write_text("{}")
    monkeypatch.setattr(tool, "TABLE", table)
    assert "no tuned table" in tool.adopt(tuned)
    tuned.write_text('{"made": ')
    assert "no tuned table" in tool.adopt(tuned) and table.read_text() == "{}"
    tuned.write_text('{"made": {}}')
    assert str(tuned) in tool.adopt(tuned) and table.read_text() == '{"made": {}}'


def test_a_report_that_fails_says_so(tool, tmp_path) -> None:
    (tmp_path / "gpu.json").write_text('{"machine": {}')
    assert "tables.md is not whole" in tool.tables(tmp_path, dict(os.environ))


def test_a_step_that_hears_nothing_is_killed_in_time(tool, tmp_path, monkeypatch) -> None:
    steps = sys.modules["gpu_steps"]
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(77)"
    monkeypatch.setattr(steps, "PATIENCE", 2)
    command = [sys.executable, "-c", deaf]
    processes = [steps._start(command, tmp_path / f"{i}.log", dict(os.environ)) for i in range(2)]
    end = time.monotonic() + 30
    while not all((tmp_path / f"{i}.log").read_text() for i in range(2)) and time.monotonic() < end:
        time.sleep(0.05)
    began = time.monotonic()
    steps._stop(processes)
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2
    assert time.monotonic() - began < 3.5  # both together, not one after the other
