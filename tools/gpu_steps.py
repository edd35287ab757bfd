"""The steps of `tools/gpu.py`: commands with time limits, whose results are kept whatever stops them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ROOT", "SITE", "WORK", "Run", "Step", "importable", "stop_on_signals"]

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "gpu"  # what need not be carried home
SITE = WORK / "site"  # packages for this run alone
LOST = 75  # exit code of a benchmark to which the GPU does not answer any more: bench/gpu.py
STARTS = 4  # of one step, at the most
MARGIN = 12  # seconds before its end in which a command that watches the clock begins nothing more
PATIENCE = 8  # seconds from an interrupt to the end of what does not hear it, and again until it is given up


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take; "{seconds}" in it becomes what is left, less MARGIN.

    Attributes:
        beside: commands that run while this one does, and not longer.
        again: whether a command that lost the GPU, or was ended by a signal of its own, is started again in what time is left.
        unless: says that nothing needs to be done.
        then: is called when the command has ended, however; returns a line on what it did, or "".
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    beside: tuple[list[str], ...] = ()
    again: bool = False
    unless: Callable[[], bool] = lambda: False
    then: Callable[[], str] = lambda: ""


@dataclass
class Run:
    """The steps of one call: a deadline, and what became of each step."""

    out: Path
    deadline: float
    environment: dict[str, str]
    results: list[dict[str, object]] = field(default_factory=list)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def step(self, step: Step) -> bool:
        """Run a command for at most its seconds, or what is left; True if it succeeded or was not needed."""
        started = time.monotonic()
        end = min(started + step.seconds, self.deadline)
        if end - started < 5:
            self.note(step.name, "not run: out of time", 0.0)
            return False
        if step.unless():
            return True
        state = "stopped: interrupted"
        try:
            state = self._state(step, end)
        finally:
            _stop(self.running)
            self.note(step.name, state, time.monotonic() - started)
        if told := step.then():
            print(f"    {told}", flush=True)
        return state == "ok"

    def _state(self, step: Step, end: float) -> str:
        environment = self.environment | step.environment
        self.running.clear()
        log = WORK / f"{step.name}.log"
        log.unlink(missing_ok=True)
        for number, command in enumerate(step.beside):
            self.running.append(_start(command, WORK / f"{step.name}-beside-{number}.log", environment))
        for _ in range(STARTS):
            left = max(1.0, end - time.monotonic() - MARGIN)
            command = [part.replace("{seconds}", f"{left:.0f}") for part in step.command]
            self.running.append(_start(command, log, environment))
            try:
                code = self.running[-1].wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return "stopped: its time was over"
            if not step.again or not (code == LOST or code < 0) or end - time.monotonic() < 15:
                break
        return "ok" if code == 0 else f"failed with {code}"

    def note(self, name: str, state: str, seconds: float) -> None:
        """Write down how a step ended, and show the end of what it printed."""
        if name == "tests":
            self.environment["TESTS"] = state  # stands above the numbers
        self.results.append({"step": name, "state": state, "seconds": round(seconds, 1)})
        (self.out / "steps.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"{name:16} {state} ({seconds:.0f} s)", flush=True)
        log = WORK / f"{name}.log"
        if seconds and log.is_file():
            text = log.read_text(errors="replace")
            with (self.out / "log.txt").open("a") as whole:
                whole.write(f"\n==== {name}: {state} ====\n{text[-500_000:]}\n")
            for line in text.splitlines()[-8:]:
                print(f"    {line[:200]}", flush=True)

    def stop(self) -> None:
        """End what runs."""
        _stop(self.running)


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """With all that they have started: interrupted first, so that pytest says what failed, then killed."""
    for how in (signal.SIGINT, signal.SIGKILL):
        end = time.monotonic() + PATIENCE
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def importable(environment: dict[str, str]) -> Iterator[None]:
    """Have Python find this folder's glf_fast where it is not installed: by links to what lies elsewhere, and metadata.

    setup.py (package_dir) says where they lie. Nothing is installed, because pip alone takes seconds of the GPU machine.
    """
    before = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SITE), *([before] if before else [])])
    links = {ROOT / "glf_fast" / "kernels": ROOT / "kernels", ROOT / "glf_fast" / "cuda": ROOT / "csrc" / "cuda"}
    made: list[Path] = []
    try:
        importlib.metadata.version("glf_fast")
    except importlib.metadata.PackageNotFoundError:
        _write_metadata()
        made = [link for link in links if not link.exists()]
    for link in made:
        link.symlink_to(links[link], target_is_directory=True)
    try:
        yield
    finally:
        for link in made:
            link.unlink()


def _write_metadata() -> None:
    """What `importlib.metadata` needs to say glf_fast's version."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "pyproject.toml names no version"
    information = SITE / f"glf_fast-{found[1]}.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: glf_fast\nVersion: {found[1]}\n")


def stop_on_signals() -> None:
    """Turn the first Ctrl-C or SIGTERM into a KeyboardInterrupt, and ignore those that follow it.

    While what runs is stopped and results are written, nothing may interrupt that.
    """

    def interrupt(*_: object) -> None:
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.SIG_IGN)
        raise KeyboardInterrupt

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, interrupt)
