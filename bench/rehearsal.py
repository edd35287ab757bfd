"""`bench.gpu_clock` on a processor, to rehearse `bench.gpu` with small cases: all of it runs, and its numbers mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.accelerated import ProjectCase
from bench.assemble import PluCase
from bench.cases import AutoregressiveCase, CouplingCase, FlowCase, SplineCase
from bench.linear import AppliedCase, LinearCase
from bench.memory import MemoryCase
from bench.race import Calls, Case, Race
from bench.training import PresetCase

__all__ = [
    "DEVICE",
    "GPU",
    "alive",
    "bandwidth",
    "call_times",
    "captured",
    "copy_bandwidth",
    "kernel_times",
    "launches",
    "matrix_rate",
    "name",
    "peak_memory",
    "rotations",
    "small",
]

Work = Callable[[], object]
DEVICE = "cpu"
GPU = True


def name() -> str:
    """A name that no GPU has."""
    return "rehearsal on a processor"


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


def kernel_times(works: Sequence[Work]) -> dict[str, list[float]]:
    """Times of the first pass."""
    return {"cold": _times(works[0])} | ({"warm": _times(works[0])} if len(works) == 1 else {})


def captured(work: Work) -> Work:
    """The pass, which is simply made again."""
    work()
    return work


def rotations(size: int) -> int:
    """Two, whatever the size."""
    return 2


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


def bandwidth(size: int) -> float:
    """One byte a nanosecond."""
    return 1e9


copy_bandwidth = bandwidth


SMALL: dict[type, Callable[[Any], Case]] = {
    FlowCase: lambda case: replace(case, steps=2, batch=min(case.batch, 8)),
    AutoregressiveCase: lambda case: replace(case, dim=3, hidden=(5,), steps=1, batch=4),
    CouplingCase: lambda case: replace(case, shape=(2, 4, 4, 4)),
    SplineCase: lambda case: replace(case, batch=4),
    LinearCase: lambda case: replace(case, count=3, dim=case.dim // 4),
    PluCase: lambda case: PluCase(2, 4),
    AppliedCase: lambda case: replace(case, shape=(2, 4, 2, 2)[: len(case.shape)]),
    MemoryCase: lambda case: replace(case, steps=min(case.steps, 2), batch=4),
    PresetCase: lambda case: replace(case, batch=4),
    ProjectCase: lambda case: replace(case, small=True),
}


def small(races: Iterable[Race]) -> Iterator[Race]:
    """The races with small cases, at most three of a suite, mode and providers; a compiler, which takes ten seconds, in one."""
    rows: set[tuple[object, ...]] = set()
    number: dict[tuple[object, ...], int] = {}
    compiled = False
    for race in races:
        if race.suite != "warm":
            race = replace(race, case=SMALL[type(race.case)](race.case))
            slow = {*race.names} & {"compile", "reduce-overhead"}
            if slow and (compiled or race.suite == "train_step"):
                race = race.only({*race.names} - slow)
            elif slow:
                compiled = True
        race = race.only([name for name in race.names if (*race.key, name) not in rows])
        like = (*race.key[::2], race.names)
        number[like] = number.get(like, 0) + 1
        if race.providers and (number[like] <= 3 or race.suite == "warm"):
            rows |= {(*race.key, name) for name in race.names}
            yield race
