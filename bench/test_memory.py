"""Peak memory of training against depth (D 64, H 256, 256, B 4,096): eager, ours, and ours with the reversible backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.memory import BATCH, DIM, ENVIRONMENT, HIDDEN
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
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(program, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    report(
        benchmark,
        [found.pop("seconds")] if found else done.stderr.strip()[-500:],
        case=f"memory-{steps}",
        mode="train",
        provider=way,
        batch=BATCH,
        dim=DIM,
        hidden=HIDDEN,
        steps=steps,
        **found,
    )
