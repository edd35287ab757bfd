"""`make gpu`: everything that needs a GPU, in one run on a bare machine without network. Stops itself before 9 minutes.

    python tools/gpu.py [--out FOLDER] [--minutes 8.7] [--rehearse]

Builds the extension in place, then runs the GPU tests, the benchmarks, a short training run and the tuning script, the most
important first; each has its share of the time, and what it printed is in FOLDER, with the machine's name, versions and
commit. Uses the Python that runs it (torch, triton and pytest are there); missing packages may lie in wheels/. FOLDER is
$OUT, or gpu-results. `--rehearse` does the same on a processor as far as that goes: it builds, interprets the GPU tests'
kernels, trains, and checks that the rest starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable


@dataclass
class Run:
    """The steps of one call: a deadline, and what became of each step."""

    out: Path
    deadline: float
    environment: dict[str, str]
    results: list[dict[str, object]] = field(default_factory=list)

    def step(self, name: str, command: list[str], seconds: float, **environment: str) -> bool:
        """Run a command for at most so many seconds, or what is left; its output goes to {name}.log. True if it succeeded."""
        seconds = min(seconds, self.deadline - time.monotonic())
        if seconds < 5:
            self._note(name, "not run: out of time", 0.0)
            return False
        started = time.monotonic()
        with (self.out / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(seconds)
                state = "ok" if code == 0 else f"failed with {code}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                state = "stopped: its time was over"
        self._note(name, state, time.monotonic() - started)
        return state == "ok"

    def _note(self, name: str, state: str, seconds: float) -> None:
        self.results.append({"step": name, "state": state, "seconds": round(seconds, 1)})
        (self.out / "steps.json").write_text(json.dumps(self.results, indent=1) + "\n")
        print(f"{name:12} {state} ({seconds:.0f} s)", flush=True)
        log = self.out / f"{name}.log"
        if log.is_file():
            for line in log.read_text(errors="replace").splitlines()[-12:]:
                print(f"    {line[:200]}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--minutes", type=float, default=8.7)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("no CUDA GPU is visible; --rehearse tries everything that a processor can do")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "GLF_FAST_CACHE": str(out / "cache")}
    if arguments.rehearse:
        environment["GLF_FAST_REHEARSE"] = "1"
    run = Run(out, time.monotonic() + 60 * arguments.minutes, environment)

    wheels = ROOT / "wheels"
    if wheels.is_dir():
        run.step(
            "wheels", [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", *map(str, wheels.glob("*.whl"))], 60
        )
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    built = run.step("build", install, 150)
    run.step("info", [PYTHON, "-m", "glf_fast.info"], 30)
    if built:
        # Speed is not reported on a red test, but a test that fails must not hide the others' numbers on a lent machine:
        # bench.gpu compares every provider with the float64 reference itself.
        tests = [PYTHON, "-m", "pytest", "tests/gpu", "-m", "gpu", "--confcutdir=tests/gpu", "-q"]
        run.step("tests", [*tests, f"--junitxml={out / 'tests.xml'}"], 170)
        if sanitizer := shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer"):
            # Every kernel of the linear layers in one size each, in all four tools.
            few = [
                *tests[:3],
                "tests/gpu/test_linear.py",
                *tests[4:],
                "-k",
                "singular or (plu and 20) or (zoo and 48-dtype0)",
            ]
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
                run.step(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", *few], 30)
        run.step("bench", [PYTHON, "-m", "bench.gpu", str(out), "--seconds", "170"], 180)
        train = [PYTHON, "-m", "glf_fast.train", "--preset", "smoke", "--epochs", "40", "--out", str(out / "smoke")]
        run.step("train", train, 60)
        run.step(
            "tune",
            [
                PYTHON,
                "tools/tune_flow.py",
                "--only",
                "medium",
                "--minutes",
                "2",
                "--out",
                str(out / "launch_table.json"),
            ],
            150,
        )
    failed = [result["step"] for result in run.results if result["state"] != "ok"]
    print(f"results are in {out}" + (f"; not ok: {', '.join(map(str, failed))}" if failed else ""))
    sys.exit(bool(failed) and not arguments.rehearse)


if __name__ == "__main__":
    main()
