"""Passes in a process of their own: `python -m bench.elsewhere PROVIDER CASE MODE` times calls for as long as each line asks.

For flowjax, since jax and torch in one process share its threads' cores, and for several processes at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import processor_clock
from bench.cases import FLOWS, MODES
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

    Raises:
        AssertionError: what is wrong with its results.
    """

    def __init__(self, name: str, case: str, mode: str, threads: int = processor_clock.THREADS) -> None:
        # Of torch, of OpenMP, and of XLA, which would otherwise count the machine's cores.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.elsewhere", name, case, mode],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def start(self, seconds: float) -> None:
        """Let it call its pass for so long, at least once."""
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def finish(self) -> list[float]:
        """The seconds of each call since `start`."""
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise AssertionError(self._process.communicate()[1].strip()[-500:])
        return json.loads(line)


def _work(name: str, case: str, mode: str) -> Callable[[], object]:
    """A pass whose results are right."""
    if name == "flowjax":
        return flowjax.passes(FLOWS[case], mode)
    from bench.flows import PROVIDERS

    job = PROVIDERS[name].job(FLOWS[case], mode, processor_clock)
    if wrong := job.why_wrong():
        raise AssertionError(wrong)
    return job.run


def main() -> None:
    """Make the passes, say that they are ready, and time as many as each line of the input asks for."""
    name, case, mode = sys.argv[1:]
    if name not in NAMES or case not in FLOWS or mode not in MODES:
        raise SystemExit(
            f"usage: python -m bench.elsewhere {{{','.join(NAMES)}}} {{{','.join(FLOWS)}}} {{{','.join(MODES)}}}"
        )
    work = _work(name, case, mode)
    for _ in range(WARMUP):
        work()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        end, times, last = time.perf_counter() + float(line), [], time.perf_counter()
        while not times or last < end:
            work()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        print(json.dumps({"seconds": times}), flush=True)


if __name__ == "__main__":
    main()
