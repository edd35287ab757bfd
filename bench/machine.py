"""The description of a machine beside its numbers: versions, threads, commit, and whether the tests were green."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import glf_fast
from bench.libraries import LIBRARIES

__all__ = ["about"]


def about() -> dict[str, Any]:
    """Versions, backends, cores, threads and commit; $COMMIT says the commit where there is no repository.

    `tools/gpu.py` says in $TESTS how the tests before the benchmarks ended.
    """
    tests = os.environ.get("TESTS")
    return {
        "glf_fast": glf_fast.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "python_version": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backends": glf_fast.backends(),
        "commit": os.environ.get("COMMIT") or _commit(),
        **({"tests": tests} if tests else {}),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"


def _version(name: str) -> str:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) else ""
