"""`bench.timing` on a processor, to rehearse `bench.gpu`: every line of it runs, and its numbers mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["DEVICE", "Graph", "bandwidth", "call_times", "launches", "matrix_rate", "name", "peak_memory", "rotations"]

Work = Callable[[], object]
DEVICE = "cpu"


def name() -> str:
    """Not of a GPU."""
    return "rehearsal on a processor"


class Graph:
    """Passes that are simply made again."""

    def __init__(self, *works: Work) -> None:
        self.works = works

    def replay(self) -> None:
        """All passes once."""
        for work in self.works:
            work()

    def times(self, seconds: float, *, cold: bool) -> list[float]:
        """Seconds of a pass, three times."""
        return [seconds / len(self.works) for seconds in call_times(self.replay, seconds)[0]]


def rotations(size: int) -> int:
    """Two, whatever the size."""
    return 2


def call_times(work: Work, seconds: float) -> tuple[list[float], float]:
    """Seconds of three calls, and of the fastest."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times, min(times)


def peak_memory(work: Work) -> int:
    """One pass, one byte."""
    work()
    return 1


def launches(work: Work) -> int:
    """One pass, one launch."""
    work()
    return 1


def matrix_rate(precision: str) -> float:
    """One operation a nanosecond."""
    return 1e9


def bandwidth() -> float:
    """One byte a nanosecond."""
    return 1e9
