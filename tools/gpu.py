"""`make gpu` and `make gpu-again`: all that needs a GPU, in two calls on a bare machine that is there for fifteen minutes.

    python tools/gpu.py [--out FOLDER] [--carry ARCHIVE] [--only STEP,STEP …] [--minutes 7] [--rehearse]
    python tools/gpu.py --second [--before FOLDER] …

The first call takes 7 minutes at the most: it takes over what was compiled beforehand (`make gpu-here`, build/gpu-here/
carry.tar.xz) or builds; then come the GPU tests, with compilers of the baselines beside them; tuning, whose table everything
that follows uses; the benchmark; Nsight Compute's view of five kernels; compute-sanitizer. The second takes 5: what the first
one cut or failed, its rows of the goals once more for the spread, the rest of the benchmark, a training run, and
compute-sanitizer's other tools. Each step is a process with a time limit. Ctrl-C and SIGTERM stop the step that runs, and
leave its results written. A call stops itself before its end.

FOLDER is $OUT, or gpu-results, and gets at most eight files: steps.json, log.txt (all that the steps printed), gpu.json and
tables.md (the benchmark), and tests.xml, launch_table.json, profile.json, profile.ncu-rep of the first, training.json and
samples.png of the second call. The first call keeps steps.json, gpu.json and launch_table.json in build/gpu/first, too, where
the second looks for them: on another machine they must be carried.

Uses the Python that runs it (torch, Triton and pytest are there), and installs nothing for the first call. Training needs
tyro, docstring-parser and typeguard, as wheels in wheels/ (the archive brings them), and data in build/gpu/data (gpu_train.py).
Other libraries' flows, and those of public projects, are measured where wheels of nflows, normflows, FrEIA and zuko lie
there, too.
`--only` takes steps by name; what prepares a fresh machine comes before them. `--rehearse` makes both calls on a processor as
far as that goes: it builds, interprets the tests' kernels, runs every group of the benchmark with small cases, and trains.
$COMMIT names the commit where the repository did not come along. Afterwards:

    python -m bench.report --keep MACHINE FIRST/gpu.json SECOND/gpu.json && python -m bench.report --docs
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from gpu_machine import COMPLETE
from gpu_steps import ROOT, SITE, WORK, Run, Step, importable, stop_on_signals

PYTHON = sys.executable
TABLE = ROOT / "kernels" / "launch_table.json"
ARCHIVE = ROOT / "build" / "gpu-here" / "carry.tar.xz"
FIRST = WORK / "first"  # what the second call wants to know of the first
KEPT = ("steps.json", "gpu.json", "launch_table.json")
MINUTES = {"first": 7.0, "second": 5.0}
LAST = 25  # seconds before the end in which no step runs: what runs is stopped, and tables are made
PREPARATION = ("unpack", "machine", "build", "wheels", "table")
COMPILERS = 4  # processes that compile baselines beside the tests
SLOWER = 6  # a rehearsal has two cores where a GPU machine has 16, and an interpreter


@dataclass(frozen=True)
class Call:
    """One of the two calls: its steps, the most important first."""

    out: Path
    before: Path
    carry: Path
    rehearse: bool

    @property
    def _rehearse(self) -> list[str]:
        return ["--rehearse"] if self.rehearse else []

    def preparation(self) -> Iterator[Step]:
        """Libraries and kernels that were compiled beforehand, or a build."""
        if self.carry.is_file() and not self.rehearse:
            yield Step("unpack", [PYTHON, "tools/carry.py", "unpack", str(self.carry)], 30)
        yield Step("machine", [PYTHON, "tools/gpu_machine.py", *self._rehearse], 40)
        build = [PYTHON, "setup.py", "build_ext", "--inplace"]
        yield Step("build", build, 150, unless=lambda: not self.rehearse and compiled())

    def first(self) -> Iterator[Step]:
        """What is worth most: right, tuned, measured, explained."""
        yield from self.preparation()
        yield self.tests()
        table = self.out / "launch_table.json"
        if not self.rehearse:
            tune = [PYTHON, "tools/tune_flow.py", "--seconds", "{seconds}", "--out", str(table)]
            yield Step("tune", tune, 95, then=partial(adopt, table))
        yield self.measure("first", 172)
        profile = {"TRITON_INTERPRET": "1"} if self.rehearse else {}
        yield Step("profile", [PYTHON, "tools/gpu_profile.py", str(self.out), *self._rehearse], 65, profile)
        yield from self.sanitize("memcheck", "racecheck")

    def second(self) -> Iterator[Step]:
        """What the first call left, and what it had no room for."""
        yield from self.preparation()
        wheels = sorted((ROOT / "wheels").glob("*.whl"))
        if wheels and not self.rehearse:
            install = [PYTHON, *["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"], str(SITE)]
            yield Step("wheels", [*install, *map(str, wheels)], 40)
        table = self.before / "launch_table.json"
        if table.is_file() and not self.rehearse:
            yield Step("table", [PYTHON, "-c", ""], 10, then=partial(adopt, table))
        yield from self.left()
        yield self.measure("second", 140)
        yield Step("train", [PYTHON, "tools/gpu_train.py", str(self.out), "--seconds", "{seconds}"], 75)
        yield from self.sanitize("initcheck", "synccheck")

    def left(self) -> Iterator[Step]:
        """Steps of the first call that did not end well, but for the benchmark, which knows what it has measured."""
        states = {row["step"]: row["state"] for row in _read(self.before / "steps.json")}
        for step in self.first():
            if step.name not in (*PREPARATION, "measure") and states.get(step.name, "ok") != "ok":
                yield step

    def tests(self) -> Step:
        """All GPU tests, and beside them processes that compile the baselines: nothing is timed yet.

        A test that fails does not stop the call, because the time on a GPU is short: the benchmark compares every
        provider with float64 itself. But its page says that the times are not valid.
        """
        tests = [
            PYTHON,
            *["-m", "pytest", "tests/gpu", "-m", "gpu", "--confcutdir=tests/gpu", "-q", "-p", "no:cacheprovider"],
        ]
        if importlib.util.find_spec("xdist"):
            tests += ["-n", str(min(12, os.cpu_count() or 1))]
        if not self.rehearse:
            tests += ["--durations=10"]
        compilers = tuple(
            self.bench("warm", WORK / f"warm-{i}", "--seconds", "{seconds}", "--share", f"{i}/{COMPILERS}")
            for i in range(COMPILERS)
        )
        # Threads of OpenMP spin while they wait, and there are more processes than cores: docs/traps.md.
        alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        beside = () if self.rehearse else compilers
        return Step("tests", [*tests, f"--junitxml={self.out / 'tests.xml'}"], 100, alone, beside)

    def measure(self, what: str, seconds: float) -> Step:
        """The benchmark, which goes on behind whatever took the GPU from it."""
        before = ["--before", str(self.before / "gpu.json")] if what == "second" else []

        def forget() -> str:
            (self.out / "gpu.begun").unlink(missing_ok=True)
            return ""

        return Step(
            "measure", self.bench(what, self.out, "--seconds", "{seconds}", *before), seconds, again=True, then=forget
        )

    def bench(self, what: str, out: Path, *options: str) -> list[str]:
        """A command of bench.gpu."""
        return [PYTHON, "-m", "bench.gpu", what, str(out), *options, *self._rehearse]

    def sanitize(self, *tools: str) -> Iterator[Step]:
        """Small calls of every kernel under tools of compute-sanitizer; in a rehearsal once, without it."""
        script = [PYTHON, "tools/gpu_sanitized.py", *self._rehearse]
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        # Without torch's cache of memory each tensor is an allocation, and a kernel that leaves one is seen.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if self.rehearse:
            yield Step(f"sanitize-{tools[0]}", script, 120, {"TRITON_INTERPRET": "1"})
            return
        for tool in tools:
            yield Step(f"sanitize-{tool}", [sanitizer, "--tool", tool, "--error-exitcode", "1", *script], 40, uncached)


def compiled() -> bool:
    """Whether the step "machine" found all of the extension."""
    log = WORK / "machine.log"
    return log.is_file() and COMPLETE in log.read_text()


def adopt(table: Path) -> str:
    """Have all that follows use a tuned launch table, in the place of the working copy's."""
    try:
        json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"no tuned table is used: {error}"
    shutil.copy(table, TABLE)
    return f"from here on kernels are launched as {table} says; it replaced {TABLE}"


def _read(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def tables(out: Path, environment: dict[str, str]) -> str:
    """Write tables.md, and print its last part, the goals; returns what went wrong, or ""."""
    command = [PYTHON, "-m", "bench.report", str(out / "gpu.json")]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "tables.md was not written in 20 seconds: python -m bench.report gpu.json writes it"
    (out / "tables.md").write_text(done.stdout)
    print(done.stdout.rpartition("## Goals")[2], flush=True)
    return f"tables.md is not whole: {done.stderr.strip()[-500:]}" if done.returncode else ""


def shared(rehearse: bool, before: Path) -> dict[str, str]:
    """The environment of all steps."""
    states = {str(row["step"]): str(row["state"]) for row in _read(before / "steps.json")}
    environment = {
        **os.environ,
        "GLF_FAST_CACHE": str(WORK / "cache"),
        # In words, because torch's compiler puts Triton's cache elsewhere where nobody has, for our kernels, too.
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(WORK / "triton")),
        "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",  # without a network pip would try for minutes
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TESTS": states.get("tests", "not run"),
        "COMMIT": os.environ.get("COMMIT") or _commit(),  # before a tuned table makes the repository dirty
    }
    return environment | ({"GLF_FAST_REHEARSE": "1"} if rehearse else {})


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def call(which: str, arguments: argparse.Namespace, out: Path, before: Path) -> int:
    """Make the first or the second call; returns its exit code."""
    environment = shared(arguments.rehearse, before if which == "second" else Path("/nowhere"))
    minutes = arguments.minutes or MINUTES[which] * (SLOWER if arguments.rehearse else 1)
    run = Run(out, time.monotonic() + 60 * minutes - LAST, environment)
    planned = Call(out, before, arguments.carry, arguments.rehearse)
    steps = planned.first if which == "first" else planned.second
    only, names = [name for name in arguments.only.split(",") if name], [step.name for step in steps()]
    if unknown := {*only} - {*names}:
        sys.exit(f"no step {', '.join(unknown)}; there are {', '.join(names)}")
    for folder in (out, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    for old in () if only else ("gpu.json", "gpu.begun", "log.txt", "steps.json"):
        (out / old).unlink(missing_ok=True)
    interrupted, whole_first = False, which == "first" and not only
    with importable(environment):
        try:
            for step in steps():  # the next one is planned when the last one has ended: it may have brought wheels
                if not only or step.name in {*only, *PREPARATION}:
                    run.step(replace(step, seconds=(SLOWER if arguments.rehearse else 1) * step.seconds))
                if whole_first:
                    keep(out)
        except KeyboardInterrupt:
            interrupted = True
            run.stop()  # again: the signal may have come while they were being stopped
            if whole_first:
                keep(out)
        if (out / "gpu.json").is_file() and (problem := tables(out, environment)):
            print(problem)
    failed = [result["step"] for result in run.results if result["state"] != "ok"]
    print(f"results are in {out}" + (f"; not ok: {', '.join(map(str, failed))}" if failed else ""))
    return 130 if interrupted else bool(failed)


def keep(out: Path) -> None:
    """Put where the second call looks what it needs to know of the first."""
    shutil.rmtree(FIRST, ignore_errors=True)
    FIRST.mkdir(parents=True)
    for name in KEPT:
        if (out / name).is_file():
            shutil.copy(out / name, FIRST)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--second", action="store_true", help="Make the second call.")
    parser.add_argument("--before", type=Path, default=FIRST, help="Results of the first call.")
    parser.add_argument("--carry", type=Path, default=ARCHIVE, help="What was compiled beforehand.")
    parser.add_argument("--only", default="", metavar="STEP,STEP", help="These steps alone, and what prepares them.")
    parser.add_argument("--minutes", type=float, help="Time of the call: 7 of the first, 5 of the second.")
    parser.add_argument("--rehearse", action="store_true", help="Both calls on a processor; numbers mean nothing.")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible; --rehearse tries everything that a processor can do")
    out, before = arguments.out.resolve(), arguments.before.resolve()
    stop_on_signals()
    if not arguments.rehearse:
        sys.exit(call("second" if arguments.second else "first", arguments, out, before))
    code = 0 if arguments.second else call("first", arguments, out, before)
    sys.exit(code if code == 130 else call("second", arguments, out / "second", FIRST) or code)


if __name__ == "__main__":
    main()
