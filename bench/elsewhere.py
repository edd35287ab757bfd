"""Passes in a process of their own: `python -m bench.elsewhere PROVIDER CASE MODE` times calls for as long as each line asks.

For flowjax, since jax and torch in one process share its threads' cores, and for several processes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from bench import processor_clock
from bench.cases import FIT_EPOCHS, FIT_ROWS, FLOWS_BY_NAME, MODES
from bench.libraries import flowjax
from bench.race import WARMUP

__all__ = ["NAMES", "Elsewhere", "why_not"]

NAMES = ("glf_fast", "eager", "flowjax")
ROOT = Path(__file__).parent.parent


def why_not(name: str) -> str:
    """Why a provider cannot be measured, or ""."""
    return flowjax.why_not() if name == "flowjax" else ""


class Elsewhere:
    """A provider's passes over a case in a mode, in a process with so many threads.

    Methods raise AssertionError with the process's last words if it has failed.
    """

    def __init__(self, name: str, case: str, mode: str, threads: int = processor_clock.THREADS) -> None:
        self._complaints = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - a pipe that nobody reads would fill
        # Threads of torch and of XLA, which would otherwise count the machine's cores.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.elsewhere", name, case, mode],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True,
        )  # fmt: skip
        self.close = weakref.finalize(self, _end, self._process, self._complaints)

    def wait(self) -> None:
        """Until its passes are right and warm, once, before anything else."""
        self._answer()

    def burst(self, seconds: float) -> list[float]:
        """Call for so long, at least once; returns the seconds of each call."""
        self.start(seconds)
        return self.finish()

    def start(self, seconds: float) -> None:
        """Let it call its pass for so long, at least once."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `finish` says why
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()

    def finish(self) -> list[float]:
        """The seconds of each call since `start`."""
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            self._process.wait(timeout=30)
            self._complaints.seek(0)
            complaints = self._complaints.read().strip()[-500:]
            self.close()
            raise AssertionError(complaints)
        return json.loads(line)


def _end(process: subprocess.Popen[str], complaints: IO[str]) -> None:
    """Let it read the end of its input, and wait for it, but not for ever."""
    try:
        process.communicate(timeout=30)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        process.kill()
        process.wait()
    complaints.close()


def _work(name: str, case: str, mode: str) -> Callable[[], object]:
    """A pass whose results are right."""
    if name == "flowjax" and mode == "fit":
        return flowjax.fits(FLOWS_BY_NAME[case], FIT_ROWS, FIT_EPOCHS)
    if name == "flowjax":
        return flowjax.passes(FLOWS_BY_NAME[case], mode)
    from bench.flows import PROVIDERS

    job = PROVIDERS[name].job(FLOWS_BY_NAME[case], mode, processor_clock)
    if wrong := job.why_wrong():
        raise AssertionError(wrong)
    return job.run


def main() -> None:
    """Make the passes, say that they are ready, and time as many as each line of the input asks for."""
    name, case, mode = sys.argv[1:]
    modes = (*MODES, "fit") if name == "flowjax" else MODES
    if name not in NAMES or case not in FLOWS_BY_NAME or mode not in modes:
        raise SystemExit(f"usage: python -m bench.elsewhere {{{','.join(NAMES)}}} CASE {{{','.join(modes)}}}")
    work = _work(name, case, mode)
    for _ in range(WARMUP):
        work()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        times: list[float] = []
        last = time.perf_counter()
        end = last + float(line)
        while not times or last < end:
            work()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        print(json.dumps({"seconds": times}), flush=True)


if __name__ == "__main__":
    main()
