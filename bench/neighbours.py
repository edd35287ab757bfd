"""Several processes at once on one machine, as notebooks, joblib's workers and tests in parallel are.

Each of so many processes makes the same pass over and over, with as many threads as the machine has cores (or
OMP_NUM_THREADS). Its fair share is the time of a pass alone on one thread, times processes/threads where that is more than 1.
`share` says how many times that long a pass takes: the mean of each process, and of these means the mean, so that a starved
process counts as much as one that was served. `worst` says how many times the median the longest pass takes.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from bench import elsewhere, processor_clock
from bench.cases import FLOWS, Unrated
from bench.elsewhere import Elsewhere
from bench.race import Clock, Job, Provider

__all__ = ["PROVIDERS", "NeighboursCase"]


@dataclass(frozen=True)
class NeighboursCase(Unrated):
    """So many processes that run a flow of `FLOWS`, for so many seconds."""

    flow: str
    processes: int
    seconds: float = 2.0

    @property
    def name(self) -> str:
        """sbi-2: two processes."""
        return f"{self.flow}-{self.processes}"

    @property
    def sizes(self) -> dict[str, Any]:
        """For results."""
        return FLOWS[self.flow].sizes | {"processes": self.processes}


def together(name: str, case: NeighboursCase, mode: str, threads: int) -> list[list[float]]:
    """Seconds of all calls of each process."""
    with ExitStack() as stack:
        several = [
            stack.enter_context(closing(Elsewhere(name, case.flow, mode, threads))) for _ in range(case.processes)
        ]
        for process in several:
            process.wait()
        for process in several:
            process.start(case.seconds)
        return [process.finish() for process in several]


@cache
def alone(name: str, flow: str, mode: str, seconds: float) -> float:
    """Mean seconds of a pass of one process on one thread."""
    return statistics.fmean(*together(name, NeighboursCase(flow, 1, seconds), mode, 1))


def _job(name: str, case: NeighboursCase, mode: str, clock: Clock) -> Job:
    threads = processor_clock.THREADS
    fair = alone(name, case.flow, mode, case.seconds) * max(1.0, case.processes / threads)
    processes = together(name, case, mode, threads)
    seconds = [second for process in processes for second in process]
    mean = statistics.fmean(map(statistics.fmean, processes))
    info = {"mean": mean, "share": mean / fair, "worst": max(seconds) / statistics.median(seconds)}
    return Job(None, lambda _: "", seconds=seconds, info=info)


def _why_not(name: str, case: NeighboursCase, mode: str, device: str) -> str:
    return elsewhere.why_not(name)


PROVIDERS = {name: Provider(name, partial(_job, name), partial(_why_not, name)) for name in elsewhere.NAMES}
