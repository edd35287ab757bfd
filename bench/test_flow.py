"""Whole flows on a processor: ours, the same in plain PyTorch, and four libraries, interleaved.

    pytest bench/test_flow.py --benchmark-only

Every time stands beside the floor (matrix products at the machine's measured rate, or bytes at its bandwidth). A flow
whose values are not those of the float64 reference fails before it is timed (`bench.baselines.provider`).
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.baselines import LIBRARIES, PLAIN, provider, why_missing
from bench.cases import FLOWS, MODES, SMALL_BATCH, FlowCase
from bench.walltime import floor, interleave, matrix_rate

THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads()
SECONDS = 8.0  # for all providers of a case and mode

# Case, modes and providers. The large cases are for those who come near the machine's rate.
SUITE: list[tuple[FlowCase, tuple[str, ...], tuple[str, ...]]] = [
    *((FLOWS[name], MODES, ("glf_fast", *PLAIN, *LIBRARIES)) for name in ("glf-cifar", "glf-mnist", "sbi")),
    *((case, ("log_prob", "sample"), ("glf_fast", *PLAIN, *LIBRARIES)) for case in SMALL_BATCH.values()),
    *((FLOWS[name], ("log_prob", "train"), ("glf_fast", "eager", "FrEIA")) for name in ("throughput", "wide")),
]
TASKS = [(case, mode, name) for case, modes, names in SUITE for mode in modes for name in names]


@cache
def times(case: FlowCase, mode: str) -> dict[str, list[float]]:
    """Seconds of every provider's passes, measured in turn."""
    names = [name for c, m, name in TASKS if c == case and m == mode and not why_missing(name, case)]
    x, context = case.inputs()
    training = mode in ("train", "step")
    return interleave({name: partial(provider(name, case, training).run, mode, x, context) for name in names}, SECONDS)


def replay(seconds: list[float]) -> Iterator[float]:
    """A clock that shows these durations one after the other, so that pytest-benchmark reports what was interleaved."""
    now = 0.0
    for duration in seconds:
        yield now
        now += duration
        yield now


@pytest.mark.parametrize(("case", "mode", "name"), TASKS, ids=[f"{c.name}-{m}-{n}" for c, m, n in TASKS])
def test_flow(case: FlowCase, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    if reason := why_missing(name, case):
        pytest.skip(reason)
    torch.set_num_threads(THREADS)
    measured = times(case, mode)
    operations, size = case.operations(mode), case.bytes(mode)
    median = statistics.median(measured[name])
    benchmark.group = f"{case.name} {mode}"
    benchmark.extra_info |= {
        "case": case.name,
        "mode": mode,
        "provider": name,
        "threads": THREADS,
        "batch": case.batch,
        "parameters": provider(name, case, mode in ("train", "step")).parameters(),
        "operations": operations,
        "bytes": size,
        "floor_s": floor(operations, size, THREADS),
        "gflops": operations / median / 1e9,
        "share_of_matrix_rate": operations / median / matrix_rate(THREADS),
        "matrix_gflops": matrix_rate(THREADS) / 1e9,
    }
    clock = replay(measured[name])
    benchmark._timer = lambda: next(clock)
    benchmark.pedantic(lambda: None, rounds=len(measured[name]), iterations=1)
