"""sbi's NPE on two moons: its default estimator and ours, on the same simulations, by wall time and posterior quality.

    pytest bench/test_two_moons.py --long --benchmark-only -s        # some minutes, alone on the machine

Time is that of `NPE.train()` with sbi's default settings, until its own stopping rule: one run a seed, both estimators in turn.
Quality is C2ST by sbi's own function, which is not timed.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.two_moons import c2st, train
from bench.walltime import report

SEEDS, SIMULATIONS, SAMPLES = 5, 10_000, 2_000
NAMES = ("sbi", "glf_fast")


@cache
def runs(folder: Path, seeds: int, simulations: int) -> dict[str, list[dict[str, Any]]]:
    """What each estimator's runs took and gave, one a seed."""
    from glf_fast.integrations.sbi import coupling_flow

    os.chdir(folder)  # sbi writes its logs where it is
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for seed in range(seeds):
        for name in NAMES if seed % 2 == 0 else NAMES[::-1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                posterior, run = train("maf" if name == "sbi" else coupling_flow(), seed, simulations)
                found[name].append(run | {"c2st": c2st(posterior, SAMPLES)})
            print(f"\nseed {seed}, {name}: {found[name][-1]}", flush=True)
    return found


@pytest.mark.timeout(3600)  # all runs are in the first test
@pytest.mark.parametrize("name", NAMES)
def test_two_moons(
    name: str, benchmark: BenchmarkFixture, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> None:
    pytest.importorskip("sbi", reason="sbi is not installed (make bench installs it)")
    quick = pytestconfig.getoption("--quick")
    if not (quick or pytestconfig.getoption("--long")):
        pytest.skip("sbi on two moons takes minutes: --long")
    seeds, simulations = (2, 500) if quick else (SEEDS, SIMULATIONS)
    before = Path.cwd()
    try:
        found = runs(tmp_path_factory.getbasetemp(), seeds, simulations)[name]
    finally:
        os.chdir(before)
    report(
        benchmark,
        [run["seconds"] for run in found],
        case="two-moons",
        mode="npe",
        provider=name,
        batch=200,
        simulations=simulations,
        parameters=found[0]["parameters"],
        **{key: [run[key] for run in found] for key in ("c2st", "epochs", "loss")},
    )
