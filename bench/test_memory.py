"""Peak memory of training against depth (D 64, H 256, 256, B 4,096): eager, ours, and ours with the reversible backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.memory import BATCH, DIM, HIDDEN
from bench.walltime import report

WAYS = {
    "eager": ("reference",),
    "glf_fast": ("cpp",),
    "glf_fast reversible": ("cpp", "--reversible"),
}


@pytest.mark.parametrize("steps", [8, 16, 32, 64])
@pytest.mark.parametrize("way", WAYS)
def test_memory(way: str, steps: int, benchmark: BenchmarkFixture) -> None:
    backend, *flags = WAYS[way]
    program = [sys.executable, "-m", "bench.memory", backend, str(steps), *flags]
    done = subprocess.run(program, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    peak, seconds = done.stdout.split()
    report(
        benchmark,
        [float(seconds)],
        case=f"memory-{steps}",
        mode="train",
        provider=way,
        batch=BATCH,
        dim=DIM,
        hidden=HIDDEN,
        steps=steps,
        peak_bytes=int(peak),
    )
