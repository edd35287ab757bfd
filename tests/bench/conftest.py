"""Made-up results, and the suites run as a user runs them."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench.results import Result, Results

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    """Parts of the GPU benchmark set it, each in a process of its own."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def made() -> Callable[..., Results]:
    """A file with these runs: {(suite, case, mode): {provider: [seconds of each run, or None]}}."""

    def make(times: dict[tuple[str, str, str], dict[str, list[float | None]]], **machine: object) -> Results:
        about = {"torch": "2.13.0", "python_version": "3.11", "cores": 2, "commit": "abc", "cpu": {"brand_raw": "X"}}
        names = ("min", "q1", "median", "q3", "max")

        def stats(runs: list[float | None]) -> dict[str, float]:
            return dict.fromkeys(names, next(t for t in runs if t is not None))

        return Results(
            about | machine,
            "2026-11-21T10:00:00",
            [
                Result(suite, case, mode, name, stats(runs), {}, list(runs))
                for (suite, case, mode), providers in times.items()
                for name, runs in providers.items()
            ],
        )

    return make


@pytest.fixture
def bench(tmp_path) -> Callable[..., tuple[subprocess.CompletedProcess, dict]]:
    """Run `pytest bench --quick` with a choice of tests and more options; returns the process and the JSON."""

    def run(choice: str, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
        path = tmp_path / "bench.json"
        command = [sys.executable, "-m", "pytest", "bench", "--quick", "--benchmark-only", "-k", choice]
        alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        done = subprocess.run(
            [*command, "-p", "no:xdist", "-p", "no:cacheprovider", f"--benchmark-json={path}", *options],
            cwd=ROOT,
            env=alone | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)},
            capture_output=True,
            text=True,
        )
        return done, json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {}

    return run


@pytest.fixture
def tool(monkeypatch):
    """tools/gpu.py as a module."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_steps", "gpu_machine"):
        del sys.modules[name]
