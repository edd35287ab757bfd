"""The benchmarks on a processor, for pytest-benchmark, which chooses, groups, tabulates, stores and compares them.

    pytest bench --benchmark-only                  # all; -k linear: one suite; -k glf-cifar-train: one case and mode
    pytest bench --benchmark-only --long -s        # several processes at once, and sbi's NPE on two moons, too: some
                                                   # minutes each, alone on the machine

A test a row. The times are those of bench/processor_clock.py, played to pytest-benchmark as its timer: it measures one function
after the other, and a machine's noise, which comes in stretches, would fall into the ratios. The first test of a race checks
and times all of its providers that were chosen. What is wrong fails, and has no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import accumulate, chain, pairwise
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import on_processor, processor_clock
from bench.memory import MemoryCase
from bench.neighbours import NeighboursCase
from bench.race import Case, Job, Missing, Race, Timed
from bench.two_moons import MoonsCase

RACES = list(on_processor.races())
# What `--quick` takes where the suite's own cases take seconds.
QUICK: dict[str, Case] = {
    "memory": MemoryCase(2, batch=256),
    "neighbours": NeighboursCase("sbi", 2, seconds=0.05),
    "two_moons": MoonsCase(500, seeds=2),
}


class Tape:
    """A timer that shows durations one after the other: each begins where the last one ended."""

    def insert(self, seconds: Sequence[float]) -> None:
        """Durations that are shown next."""
        self.ticks = chain.from_iterable(pairwise(accumulate(seconds, initial=0.0)))

    def __call__(self) -> float:
        """The time."""
        return next(self.ticks)


TAPE = Tape()


@cache
def chosen(session: pytest.Session) -> dict[Race, tuple[str, ...]]:
    """The providers of each race whose tests were not deselected."""
    found: dict[Race, tuple[str, ...]] = {}
    for item in session.items:
        if isinstance(item, pytest.Function) and item.originalname == "test_row":
            row: Any = item.callspec.params
            found[row["race"]] = (*found.get(row["race"], ()), row["name"])
    return found


@cache
def outcomes(race: Race) -> dict[str, Timed | Exception]:
    """Every provider's times, or why it has none."""
    torch.compiler.reset()  # what earlier cases compiled would make this one's calls slower, see bench.compiler
    jobs: dict[str, Job] = {}
    found: dict[str, Timed | Exception] = {}
    for name in race.names:
        try:
            jobs[name] = race.enter(name, processor_clock)
        except Exception as reason:  # whatever is wrong with one must not cost the others their times
            found[name] = reason.with_traceback(None)  # which would keep all jobs alive
    return found | race.timed(jobs, processor_clock)


@pytest.mark.benchmark(timer=TAPE)
@pytest.mark.parametrize(
    ("race", "name"),
    [pytest.param(race, name, id="-".join((*race.key, name))) for race in RACES for name in race.names],
)
def test_row(race: Race, name: str, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    wanted = request.config.getoption("--quick") or request.config.getoption("--long")
    if race.suite in on_processor.LONG and not wanted:
        pytest.skip(f"{race.suite} takes minutes: --long")
    race = race.only(chosen(request.session)[race])
    if request.config.getoption("--quick"):
        race = replace(race, case=QUICK.get(race.suite, race.case))
    found = outcomes(race)[name]
    if isinstance(found, Missing):
        pytest.skip(str(found))
    if isinstance(found, Exception):
        pytest.fail(f"{name} is wrong in {', '.join(race.key[1:])}: {type(found).__name__}: {str(found)[:500]}")
    benchmark.group = " ".join(race.key)
    benchmark.extra_info |= asdict(found.result)
    TAPE.insert(found.seconds)
    benchmark.pedantic(lambda: None, rounds=len(found.seconds), iterations=1)
