"""Which implementations of the operations this installation has, and which one runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from glf_fast.ops.checks import check_choice

__all__ = ["backends", "cpp_runs", "use_backend"]

BACKENDS = ("auto", "reference", "cpp")
SETS = {64: "AVX-512", 32: "AVX2", 16: "the processor's basic vectors (128 bits)"}

_backend = os.environ.get("GLF_FAST_BACKEND", "auto")
check_choice("$GLF_FAST_BACKEND", _backend, BACKENDS)


def _load() -> str:
    """Load the compiled kernels; returns why they are missing, or "" when they are there."""
    libraries = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not libraries:
        return "not built: install glf_fast where torch and a C++ compiler are (pip install --no-build-isolation -e .)"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load: {error}"
    importlib.import_module("glf_fast.ops.cpp_shapes")
    return ""


_missing = _load()


@cache
def _vectors() -> str:
    return SETS[torch.ops.glf_fast.cpu_vector_bytes()]


def backends() -> dict[str, str]:
    """Name → one line that says whether and where that backend runs. `"reference"` always does."""
    return {
        "reference": "ready: plain PyTorch, any device and dtype",
        "cpp": _missing or f"ready: float32 and float64 on the processor, with {_vectors()}",
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on one backend: "auto" (the fastest there is), "reference" or "cpp".

    $GLF_FAST_BACKEND sets the same for a whole process. What a backend cannot run falls back to the reference.

    Raises:
        ValueError: an unknown name. RuntimeError: that backend is not there; the message says why.
    """
    global _backend
    check_choice("backend", name, BACKENDS)
    if name == "cpp" and _missing:
        raise RuntimeError(f"backend 'cpp' is {_missing}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def cpp_runs(x: Tensor) -> bool:
    """Whether the C++ kernels take this tensor here and now. Function transforms and forward-mode need the reference."""
    return (
        _backend != "reference"
        and not _missing
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )
