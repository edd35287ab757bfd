"""Whole flows on a processor: ours, the same in plain PyTorch, and four libraries, interleaved.

    pytest bench/test_flow.py --benchmark-only

Every time stands beside a yardstick (the products at torch's matrix rate, or the bytes at the machine's bandwidth). A flow
whose values are not those of the float64 reference fails, and reports no time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import LIBRARIES, provider, why_missing
from bench.cases import DEPTH, FLOWS, GRID, MODES, SMALL_BATCH, FlowCase
from bench.walltime import Contestant, compete, matrix_rate, report, yardstick


@dataclass(frozen=True)
class Race:
    """Those who run in turn, for so many seconds in all."""

    case: FlowCase
    mode: str
    names: tuple[str, ...]
    seconds: float


def entries(races: Iterable[Race]) -> Any:
    """A test a race and name."""
    found = [
        pytest.param(race, name, id=f"{race.case.name}-{race.mode}-{name}") for race in races for name in race.names
    ]
    return pytest.mark.parametrize(("race", "name"), found)


# The large cases are for those who come near the machine's rate. FrEIA stands for the libraries where there are many cases: it
# is the fastest of them nearly everywhere.
ALL, FEW = ("glf_fast", "eager", "compile", *LIBRARIES), ("glf_fast", "eager", "FrEIA")
# torch.compile takes longer to compile a case than all take to run it, so at B = 16, between 1 and 64, it is left out.
BETWEEN = tuple(name for name in ALL if name != "compile")
NAMED = [
    *(Race(FLOWS[name], mode, ALL, 4.0) for name in ("glf-cifar", "glf-mnist", "sbi") for mode in MODES),
    *(
        Race(case, mode, BETWEEN if case.batch == 16 else ALL, 3.0)
        for case in SMALL_BATCH.values()
        for mode in ("log_prob", "sample")
    ),
    *(Race(FLOWS[name], mode, FEW, 3.0) for name in ("throughput", "wide") for mode in ("log_prob", "train")),
]
DEEP = [Race(case, "train", FEW, 1.0) for case in DEPTH.values()]
WIDE = [Race(case, "train", FEW, 1.0) for case in GRID.values()]


@cache
def times(race: Race) -> dict[str, list[float] | str]:
    """Seconds of every provider's passes, measured in turn, or what is wrong with it."""
    case, mode = race.case, race.mode
    x, context = case.inputs()
    contestants = {}
    for name in race.names:
        if not why_missing(name, case):
            try:
                made = provider(name, case, mode in ("train", "step"))
            except AssertionError as reason:
                contestants[name] = Contestant(lambda: None, partial(str, reason))
            else:
                contestants[name] = Contestant(partial(made.run, mode, x, context), partial(made.why_wrong, mode, case))
    return compete(contestants, race.seconds)


def measure(benchmark: BenchmarkFixture, race: Race, name: str) -> None:
    case, mode = race.case, race.mode
    if reason := why_missing(name, case):
        pytest.skip(reason)
    found = times(race)[name]
    operations, size = case.operations(mode), case.bytes(mode)
    rate = operations / statistics.median(found) if isinstance(found, list) else 0.0
    report(
        benchmark,
        found,
        case=case.name,
        mode=mode,
        provider=name,
        batch=case.batch,
        dim=case.dim,
        hidden=case.hidden,
        steps=case.steps,
        operations=operations,
        bytes=size,
        yardstick_s=yardstick(operations, size),
        gflops=rate / 1e9,
        matrix_gflops=matrix_rate() / 1e9,
    )


@entries(NAMED)
def test_flow(race: Race, name: str, benchmark: BenchmarkFixture) -> None:
    measure(benchmark, race, name)


@entries(DEEP)
def test_depth(race: Race, name: str, benchmark: BenchmarkFixture) -> None:
    measure(benchmark, race, name)


@entries(WIDE)
def test_grid(race: Race, name: str, benchmark: BenchmarkFixture) -> None:
    measure(benchmark, race, name)
