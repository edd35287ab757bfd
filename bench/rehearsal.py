"""`bench.timing` on a processor, to rehearse `bench.gpu`: every line of it runs, and its numbers mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from bench.timing import Calls

__all__ = [
    "DEVICE",
    "Graph",
    "alive",
    "bandwidth",
    "call_times",
    "launches",
    "matrix_rate",
    "name",
    "peak_memory",
    "rotations",
]

Work = Callable[[], object]
DEVICE = "cpu"


def name() -> str:
    """Not of a GPU."""
    return "rehearsal on a processor"


class Graph:
    """Passes that are simply made again."""

    def __init__(self, *works: Work) -> None:
        self.works = works
        self.results: list[object] = []
        self.replay()

    def replay(self) -> None:
        """All passes once."""
        self.results = [work() for work in self.works]

    def times(self, seconds: float, *, cold: bool) -> list[float]:
        """Seconds of a pass, three times."""
        return [seconds / len(self.works) for seconds in _times(self.replay)]


def rotations(size: int) -> int:
    """Two, whatever the size."""
    return 2


def call_times(works: Mapping[str, Work], seconds: float) -> dict[str, Calls | Exception]:
    """Seconds of three calls of each work, and of the fastest; or what it raised."""
    found: dict[str, Calls | Exception] = {}
    for name, work in works.items():
        try:
            found[name] = Calls(times := _times(work), min(times))
        except Exception as error:
            found[name] = error
    return found


def _times(work: Work) -> list[float]:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def peak_memory(work: Work) -> int:
    """One pass, one byte."""
    work()
    return 1


def launches(work: Work) -> int:
    """One pass, one launch."""
    work()
    return 1


def alive() -> bool:
    """A processor always answers."""
    return True


def matrix_rate(precision: str) -> float:
    """One operation a nanosecond."""
    return 1e9


def bandwidth() -> float:
    """One byte a nanosecond."""
    return 1e9
