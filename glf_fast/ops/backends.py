"""Which implementations of the operations this installation has, and which one runs."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glf_fast.ops.checks import check_choice

__all__ = ["backend_for", "backends", "use_backend"]

VECTORS = {64: "AVX-512", 32: "AVX2", 16: "the processor's basic vectors (128 bits)"}


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations: which tensors it takes, and whether it is there."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: str  # why it cannot run, or "". Known at import: torch.compile must not meet the finding out.
    ready: Callable[[], str]  # one line on what it is, where it can
    remedy: str  # what a user whose tensors it would take should do where it is missing


def _load_cpp() -> str:
    """Load the compiled processor kernels; returns why they are missing, or "" when they are there."""
    libraries = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not libraries:
        return "not built: no C++ compiler was found when glf_fast was installed"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load: {error}"
    importlib.import_module("glf_fast.ops.cpp_shapes")
    return ""


def _load_cuda() -> str:
    """Load the compiled CUDA kernels; returns why they are missing, or ""."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    if why := BACKENDS["cpp"].missing:
        return f"it needs the backend 'cpp', which is missing: {why}"
    libraries = sorted(Path(__file__).parent.parent.glob("_cuda*.so"))
    if not libraries:
        return "not built: no nvcc was found when glf_fast was installed"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load: {error}"
    return ""


def _cpp_ready() -> str:
    return f"float32 and float64 on the processor, with {VECTORS[torch.ops.glf_fast.cpu_vector_bytes()]}"


BACKENDS = {
    "cpp": Backend(
        device="cpu",
        dtypes=(torch.float32, torch.float64),
        missing=_load_cpp(),
        ready=_cpp_ready,
        remedy="install again with a C++ compiler: pip install --no-build-isolation --force-reinstall --no-deps glf_fast",
    ),
}
BACKENDS["cuda"] = Backend(
    device="cuda",
    dtypes=(torch.float32, torch.float64),
    missing=_load_cuda(),
    ready=lambda: "linear layers in float32 and float64 on NVIDIA GPUs",
    remedy="install again with CUDA's compiler, nvcc: pip install --no-build-isolation --force-reinstall --no-deps glf_fast",
)
CHOICES = ("auto", "reference", *BACKENDS)

_backend = os.environ.get("GLF_FAST_BACKEND", "auto")
check_choice("$GLF_FAST_BACKEND", _backend, CHOICES)
_warned: set[str] = set()


def backends() -> dict[str, str]:
    """Name → one line that says whether and where that backend runs. `"reference"` always does."""
    states = {name: backend.missing or f"ready: {backend.ready()}" for name, backend in BACKENDS.items()}
    return {"reference": "ready: plain PyTorch, any device and dtype", **states}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on one backend: "auto" (the fastest there is), "reference" or one of
    `backends()`.

    $GLF_FAST_BACKEND sets the same for a whole process. What a backend cannot run falls back to the reference.

    Raises:
        ValueError: an unknown name. RuntimeError: that backend is not there; the message says why.
    """
    global _backend
    check_choice("backend", name, CHOICES)
    if name in BACKENDS and (why := BACKENDS[name].missing):
        raise RuntimeError(f"backend {name!r} cannot run here: {why}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def backend_for(x: Tensor, *names: str) -> str:
    """The first of these backends that takes this tensor here and now, else "reference".

    Function transforms and forward-mode derivatives need the reference. Where a backend is missing, says so once.
    """
    if _backend == "reference" or torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    for name in names if _backend == "auto" else {_backend}.intersection(names):
        backend = BACKENDS[name]
        if x.device.type == backend.device and x.dtype in backend.dtypes:
            if not (why := backend.missing):
                return name
            _warn_once(name, why)
    return "reference"


def _warn_once(name: str, why: str) -> None:
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        warnings.warn(
            f"glf_fast runs its slow reference, because backend {name!r} is missing ({why}). To make it fast, "
            f"{BACKENDS[name].remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
