"""The elementwise affine coupling of images on a processor: ours, plain PyTorch and torch.compile, interleaved.

    pytest bench/test_coupling.py --benchmark-only

Every time stands beside a yardstick: the least bytes at the bandwidth of torch's own copy of as many. torch.compile, which
takes seconds to compile a shape, is there for one of the three.
"""

from __future__ import annotations

import statistics
from functools import cache, partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import COUPLING_MODES, COUPLINGS, CouplingCase
from bench.couplings import PROVIDERS, Coupling
from bench.walltime import Contestant, compete, copy_bandwidth, report

SECONDS = 1.0  # for all providers of a case and mode
COMPILED = (64, 24, 8, 8)


def names(case: CouplingCase) -> tuple[str, ...]:
    return tuple(name for name in PROVIDERS if name != "compile" or case.shape == COMPILED)


TASKS = [(case, mode, name) for case in COUPLINGS for mode in COUPLING_MODES for name in names(case)]


@cache
def times(case: CouplingCase, mode: str) -> dict[str, list[float] | str]:
    """Seconds of every provider's passes, measured in turn, or what is wrong with it."""
    contestants = {}
    for name in names(case):
        coupling = Coupling(name, case)
        contestants[name] = Contestant(partial(coupling.run, mode), partial(coupling.why_wrong, mode))
    return compete(contestants, SECONDS)


@pytest.mark.parametrize(("case", "mode", "name"), TASKS, ids=[f"{c.name}-{m}-{n}" for c, m, n in TASKS])
def test_coupling(case: CouplingCase, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    found, size = times(case, mode)[name], case.bytes(mode)
    rate = size / statistics.median(found) if isinstance(found, list) else 0.0
    report(
        benchmark,
        found,
        case=case.name,
        mode=mode,
        provider=name,
        batch=case.shape[0],
        bytes=size,
        yardstick_s=size / copy_bandwidth(size),
        gbytes_per_s=rate / 1e9,
        share_of_copy=rate / copy_bandwidth(size),
    )
