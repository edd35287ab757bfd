"""Benchmarks report what they measured; warnings of other people's libraries are not errors here."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import glf_fast
from bench import walltime


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="time each pass once or so: only to see that everything runs")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(walltime.THREADS)
    if config.getoption("--quick"):
        walltime.quick()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(900))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a number needs beside it: versions, threads, instruction set, commit."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info |= {
        "glf_fast": glf_fast.__version__,
        "torch": torch.__version__,
        "python_version": platform.python_version(),
        "cores": os.cpu_count(),
        "backends": glf_fast.backends(),
        "commit": commit.stdout.strip() or "unknown",
    }
