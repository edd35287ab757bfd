"""Batched linear layers on a processor, interleaved: log|det| and inverses, PLU layers assembled, layers applied.

    pytest bench/test_linear.py --benchmark-only

Every time stands beside a yardstick: the multiply-adds at the rate of torch's matrix product, or the bytes at the machine's
bandwidth. On a GPU `make gpu` measures the same, with every library under torch.linalg and with CuPy.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import cache, partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.factors import ASSEMBLED, Assembled, PluCase
from bench.linear import APPLIED, LINEAR, Applied, AppliedCase, Linear, LinearCase, applied_names, why_missing
from bench.walltime import Contestant, compete, matrix_rate, report, yardstick

SECONDS = 0.5  # for all providers of a case and mode
NAMES = ("glf_fast", "torch.linalg", "CuPy")
# The backward is two products and their transposes: where many matrices are small, and where few are large.
TRAINED = {LinearCase(32, 192), LinearCase(1024, 8), LinearCase(1024, 16), LinearCase(1024, 32), LinearCase(1024, 64)}
DENSE = [(c, m) for c in LINEAR for m in ("forward", "train") if m == "forward" or c in TRAINED]
TASKS = [
    (case, mode, name) for case, mode in DENSE for name in (NAMES if case == LINEAR[0] else NAMES[:2])
]  # CuPy once, to say why it is not here
LAYERS = [(c, m, name) for c in APPLIED for m in ("forward", "inverse", "train") for name in applied_names(c)]
FACTORS = [(c, m, name) for c in ASSEMBLED for m in ("forward", "train") for name in ("glf_fast", "eager")]


@cache
def dense_times(case: LinearCase, mode: str) -> dict[str, list[float] | str]:
    """Seconds of every provider's passes, measured in turn, or what is wrong with it."""
    made = {name: Linear(name, case) for name in NAMES if not why_missing(name, "cpu", mode)}
    return compete(contestants(made, mode), SECONDS)


@cache
def layer_times(case: AppliedCase, mode: str) -> dict[str, list[float] | str]:
    """The same of a layer that is applied."""
    return compete(contestants({name: Applied(name, case) for name in applied_names(case)}, mode), SECONDS)


@cache
def factor_times(case: PluCase, mode: str) -> dict[str, list[float] | str]:
    """The same of a flow's layers that are assembled."""
    return compete(contestants({name: Assembled(name, case) for name in ("glf_fast", "eager")}, mode), SECONDS)


def contestants(made: Mapping[str, Linear | Applied | Assembled], mode: str) -> dict[str, Contestant]:
    return {name: Contestant(partial(x.run, mode), partial(x.why_wrong, mode)) for name, x in made.items()}


def measure(
    benchmark: BenchmarkFixture,
    case: LinearCase | AppliedCase | PluCase,
    mode: str,
    name: str,
    found: list[float] | str,
    **info: int,
) -> None:
    operations, size = case.operations(mode), case.bytes(mode)
    rate = operations / statistics.median(found) if isinstance(found, list) else 0.0
    report(
        benchmark,
        found,
        case=case.name,
        mode=mode,
        provider=name,
        operations=operations,
        bytes=size,
        yardstick_s=yardstick(operations, size),
        gflops=rate / 1e9,
        matrix_gflops=matrix_rate() / 1e9,
        **info,
    )


@pytest.mark.parametrize(("case", "mode", "name"), TASKS, ids=[f"{c.name}-{m}-{n}" for c, m, n in TASKS])
def test_linear(case: LinearCase, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    if reason := why_missing(name, "cpu", mode):
        pytest.skip(reason)
    measure(benchmark, case, mode, name, dense_times(case, mode)[name], batch=case.count, dim=case.dim)


@pytest.mark.parametrize(("case", "mode", "name"), LAYERS, ids=[f"{c.name}-{m}-{n}" for c, m, n in LAYERS])
def test_apply(case: AppliedCase, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    measure(benchmark, case, mode, name, layer_times(case, mode)[name], batch=case.shape[0], dim=case.shape[1])


@pytest.mark.parametrize(("case", "mode", "name"), FACTORS, ids=[f"{c.name}-{m}-{n}" for c, m, n in FACTORS])
def test_assemble(case: PluCase, mode: str, name: str, benchmark: BenchmarkFixture) -> None:
    measure(benchmark, case, mode, name, factor_times(case, mode)[name], batch=case.count, dim=case.dim)
