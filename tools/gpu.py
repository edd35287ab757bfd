"""`make gpu`: everything that needs a GPU, in one run on a bare machine without network. Stops itself before 9 minutes.

    python tools/gpu.py [--out FOLDER] [--wheels FOLDER] [--only STEP,STEP …] [--minutes 8.3] [--rehearse]

Builds the extension in place, then runs the GPU tests, the benchmarks, a short training run, compute-sanitizer and the tuning
script, the most important first; each is a process with a time limit of its own. What cannot be installed or built costs what
needs it: Triton's kernels need no build. Ctrl-C and SIGTERM stop the step that runs, and leave its results written. FOLDER is
$OUT, or gpu-results, and gets six files: steps.json, log.txt (all that the steps printed), gpu.json and tables.md (the
benchmarks), tests.xml, launch_table.json.

Uses the Python that runs it (torch, Triton, pytest and pytest-benchmark are there). What is missing is handed over as wheels:

    python -m pip wheel --no-deps --wheel-dir wheels -r libraries.txt tyro docstring-parser typeguard

`--only` takes steps by name, for a second run that does what the first had no time for; wheels and build, which a fresh machine
needs, come before them. Their rows are added to gpu.json.
`--rehearse` does the same on a processor as far as that goes: it builds, interprets the GPU tests' kernels, trains, and runs
every part of the benchmark with small cases. $COMMIT names the commit where the repository did not come along. Afterwards:

    python -m bench.report --keep MACHINE FOLDER/gpu.json && python -m bench.report --docs
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "gpu"  # what need not be carried home
PYTHON = sys.executable
# Seconds that a part of the benchmark may take, in the order of importance. A part stops itself 10 seconds earlier.
PARTS = {
    "flow": 95,
    "compile": 90,
    "memory": 30,
    "coupling": 45,
    "linear": 55,
    "large": 40,
    "layers": 35,
    "train_step": 50,
    "grid": 45,
    "large-bf16": 30,
    "bf16": 30,
    "small": 25,
    "depth": 25,
    "step": 40,
    "launches": 25,
    "float32": 30,
}
PREPARATION = ("wheels", "build")
# A test or two of every operation, with matrices for a warp, for a block, and too large for shared memory.
SANITIZED = "one_launch or (assemble and 33) or (batches and 7-) or (singular and (130 or 200))"


@dataclass(frozen=True)
class Step:
    """A command, and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    beside: list[str] | None = None  # runs while this does, and not longer


@dataclass
class Run:
    """The steps of one call: a deadline, and what became of each step."""

    out: Path
    deadline: float
    environment: dict[str, str]
    results: list[dict[str, object]] = field(default_factory=list)
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def step(self, step: Step) -> bool:
        """Run a command for at most its seconds, or what is left; True if it succeeded."""
        seconds = min(step.seconds, self.deadline - time.monotonic())
        if seconds < 5:
            self.note(step.name, "not run: out of time", 0.0)
            return False
        started = time.monotonic()
        environment = self.environment | step.environment
        self.running.clear()
        state = "stopped: interrupted"
        try:
            if step.beside:
                self.running.append(_start(step.beside, WORK / f"{step.name}-beside.log", environment))
            self.running.append(_start(step.command, WORK / f"{step.name}.log", environment))
            code = self.running[-1].wait(seconds)
            state = "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            state = "stopped: its time was over"
        finally:
            _stop(self.running)
            self.note(step.name, state, time.monotonic() - started)
        return state == "ok"

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


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """With all that they have started, in 8 seconds: interrupted first, so that pytest says what failed."""
    for how in (signal.SIGINT, signal.SIGKILL):
        end = time.monotonic() + 8
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def linked() -> Iterator[None]:
    """Where nothing could be installed: the packages that lie elsewhere (setup.py, package_dir) where Python looks for them."""
    links = {ROOT / "glf_fast" / "kernels": ROOT / "kernels", ROOT / "glf_fast" / "cuda": ROOT / "csrc" / "cuda"}
    made = [link for link in links if not link.exists()]
    for link in made:
        link.symlink_to(links[link], target_is_directory=True)
    try:
        yield
    finally:
        for link in made:
            link.unlink()


def _interrupt(*_: object) -> None:
    """For the first Ctrl-C or SIGTERM; while what runs is stopped and results are written, further ones are not heard."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)
    raise KeyboardInterrupt


def tables(out: Path, environment: dict[str, str]) -> str:
    """Write tables.md; returns what went wrong, or ""."""
    command = [PYTHON, "-m", "bench.report", str(out / "gpu.json")]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "tables.md was not written in 20 seconds: python -m bench.report gpu.json writes it"
    (out / "tables.md").write_text(done.stdout)
    return f"tables.md is not whole: {done.stderr.strip()[-500:]}" if done.returncode else ""


def steps(out: Path, wheels: Path, rehearse: bool) -> Iterator[Step]:
    """All of them, the most important first."""
    pip = [PYTHON, "-m", "pip", "install", "--no-deps"]
    if wheels.is_dir():
        yield Step("wheels", [*pip, "--no-index", *map(str, sorted(wheels.glob("*.whl")))], 60)
    yield Step("build", [*pip, "--no-build-isolation", "--editable", "."], 150)
    yield Step("info", [PYTHON, "-m", "glf_fast.info"], 30)

    def bench(part: str, seconds: float) -> list[str]:
        command = [PYTHON, "-m", "bench.gpu", part, str(out), "--seconds", str(seconds)]
        return [*command, "--rehearse"] if rehearse else command

    # A test that fails must not hide the others' numbers on a lent machine: bench.gpu compares every provider with the float64
    # reference itself. But speed on a red test is none, and the page says so. Compilers work beside the tests: not timed.
    tests = [PYTHON, "-m", "pytest", "tests/gpu", "-m", "gpu", "--confcutdir=tests/gpu", "-q"]
    # Most of the tests' time is the compilers' of some six hundred kernels, on 16 cores.
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not rehearse else []
    yield Step("tests", [*tests, *workers, f"--junitxml={out / 'tests.xml'}"], 150, beside=bench("warm", 150))
    train = [PYTHON, "-m", "glf_fast.train", "--preset", "smoke", "--epochs", "40", "--out", str(WORK / "smoke")]
    for part, seconds in PARTS.items():
        yield Step(f"bench-{part}", bench(part, seconds - 10), seconds)
        if part == "coupling":
            yield Step("train", train, 60)
    # Without torch's cache of memory each tensor is an allocation, and a kernel that leaves one is seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = [] if rehearse else [sanitizer, "--tool", tool, "--error-exitcode", "1"]
        if rehearse or Path(sanitizer).is_file():
            yield Step(f"sanitize-{tool}", [*command, *tests, "-k", SANITIZED], 40, uncached)
        if rehearse:
            break
    table = out / "launch_table.json"
    tune = [PYTHON, "tools/tune_flow.py", "--only", "medium", "--minutes", "2", "--out", str(table)]
    if not rehearse:
        yield Step("tune", tune, 150)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--only", default="", metavar="STEP,STEP")
    parser.add_argument("--minutes", type=float, default=8.3)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible; --rehearse tries everything that a processor can do")
    out = arguments.out.resolve()
    planned = list(steps(out, arguments.wheels, arguments.rehearse))
    only = [name for name in arguments.only.split(",") if name]
    if unknown := set(only) - {step.name for step in planned}:
        parser.error(f"no step {', '.join(unknown)}; there are {', '.join(step.name for step in planned)}")
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    for old in () if only else ("gpu.json", "log.txt"):
        (out / old).unlink(missing_ok=True)
    shutil.rmtree(WORK / "smoke", ignore_errors=True)
    environment = {
        **os.environ,
        "GLF_FAST_CACHE": str(WORK / "cache"),
        "PYTHONUNBUFFERED": "1",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # a lent machine's own Python may be used
        "TESTS": "not run",
    }
    if arguments.rehearse:
        environment["GLF_FAST_REHEARSE"] = "1"
    run = Run(out, time.monotonic() + 60 * arguments.minutes, environment)
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, _interrupt)
    interrupted = False
    with contextlib.ExitStack() as stack:
        try:
            for step in planned:
                if (not only or step.name in {*only, *PREPARATION}) and not run.step(step) and step.name == "build":
                    stack.enter_context(linked())
        except KeyboardInterrupt:
            interrupted = True
            _stop(run.running)  # again: the signal may have come while they were being stopped
    if (out / "gpu.json").is_file() and (problem := tables(out, environment)):
        print(problem)
    failed = [result["step"] for result in run.results if result["state"] != "ok"]
    print(f"results are in {out}" + (f"; not ok: {', '.join(map(str, failed))}" if failed else ""))
    sys.exit(130 if interrupted else bool(failed) and not arguments.rehearse)


if __name__ == "__main__":
    main()
