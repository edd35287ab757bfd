"""Which implementations of the operations this installation has, and which one runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from glf_fast.ops.checks import check_choice

__all__ = ["backend_for", "backends", "use_backend"]

importlib.import_module("glf_fast.ops.linear_shapes")
check_choice("$GLF_FAST_ISA", os.environ.get("GLF_FAST_ISA", ""), ("", "avx512", "avx2", "generic"))
VECTORS = {64: "AVX-512", 32: "AVX2", 16: "the processor's basic vectors (128 bits)"}


@dataclass(frozen=True)
class Backend:
    """One implementation of the operations: which tensors it takes, and whether it is there."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: str  # why it cannot run, or "". Known at import: torch.compile must not meet the finding out.
    ready: Callable[[], str]  # one line on what it is, where it can
    remedy: str  # what a user whose tensors it would take should do where it is missing
    capability: tuple[int, int] = (0, 0)  # the least compute capability of a GPU that it runs on


def _load_cpp() -> str:
    """Load the compiled processor kernels; returns why they are missing, or "" when they are there."""
    libraries = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not libraries:
        return "not built: the installation, whose log says why, found no C++ compiler that it could use"
    try:
        torch.ops.load_library(libraries[0])
    except (OSError, RuntimeError) as error:
        return f"{libraries[0].name} does not load: {error}"
    importlib.import_module("glf_fast.ops.cpp_shapes")
    return ""


_cpp_missing = _load_cpp()


_cupy: torch.library.Library | None = None  # the CUDA kernels through CuPy, where they are not compiled


def _load_cuda() -> str:
    """Load the compiled CUDA kernels, or have CuPy compile them when they are needed; returns why neither can be, or ""."""
    global _cupy
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    why = "not built: the installation, whose log says why, found no nvcc that fits this torch"
    for library in sorted(Path(__file__).parent.parent.glob("_cuda*.so")):
        try:
            torch.ops.load_library(library)
            return ""
        except (OSError, RuntimeError) as error:
            why = f"{library.name} does not load: {error}"
    if without := _cupy_missing(torch.version.cuda.partition(".")[0]):
        return f"{why}; {without}"
    _cupy = torch.library.Library("glf_fast", "IMPL")
    importlib.import_module("glf_fast.ops.cupy_linear").register(_cupy)
    return ""


def _cupy_missing(cuda: str) -> str:
    """Why CuPy cannot serve a torch of this CUDA, or "". Its metadata say it: importing it takes half a second."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy, which has a compiler of its own, is not installed"
    for name in (f"cupy-cuda{cuda}x", "cupy"):  # wheels by CUDA; conda's, and what was built from source
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        old = int(version.partition(".")[0]) < 14  # no Stream.from_external, which takes torch's streams
        return f"{name} {version} is too old: 14 is the first that works" if old else ""
    return f"the CuPy that is installed is not for CUDA {cuda}, as torch is"


def _cuda_ready() -> str:
    how = ", compiled at their first use by CuPy" if _cupy else ""
    return f"linear layers in float32 and float64 on NVIDIA GPUs{how}"


def _cpp_ready() -> str:
    return f"float32 and float64 on the processor, with {VECTORS[torch.ops.glf_fast.cpu_vector_bytes()]}"


# Triton reads it when kernels are defined; what it says now is what they will be.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _triton_missing() -> str:
    """Why the GPU kernels cannot run, or "". Nothing is imported, and no GPU is touched."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda is None and not INTERPRETED:
        return f"torch {torch.__version__} has no CUDA; for tests on a processor set TRITON_INTERPRET=1 before Python starts"
    return ""


def _triton_ready() -> str:
    if INTERPRETED:
        return "interpreted on the processor, slowly, for tests"
    return "float32 on CUDA GPUs" if torch.cuda.is_available() else "float32 on CUDA GPUs, of which none is visible"


AGAIN = "in glf_fast's folder: pip install -v --no-build-isolation --no-deps -e ."
BACKENDS = {
    "triton": Backend(
        device="cuda",
        dtypes=(torch.float32,),
        missing=_triton_missing(),
        ready=_triton_ready,
        remedy="install a torch with CUDA, which brings triton: https://pytorch.org/get-started",
        capability=(8, 0),  # tf32 and bf16
    ),
    "cpp": Backend(
        device="cpu",
        dtypes=(torch.float32, torch.float64),
        missing=_cpp_missing,
        ready=_cpp_ready,
        remedy=f"install a C++ compiler (apt install g++), then {AGAIN}",
    ),
    "cuda": Backend(
        device="cuda",
        dtypes=(torch.float32, torch.float64),
        missing=_load_cuda(),
        ready=_cuda_ready,
        remedy=(
            f"pip install 'cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x>=14', or, where nvcc of that CUDA is, "
            f"{AGAIN}"
        ),
        capability=(7, 5),  # the first architecture of setup.py
    ),
}
CHOICES = ("auto", "reference", *BACKENDS)

_backend = os.environ.get("GLF_FAST_BACKEND", "auto")
check_choice("$GLF_FAST_BACKEND", _backend, CHOICES)
if _backend in BACKENDS and BACKENDS[_backend].missing:
    raise RuntimeError(f"$GLF_FAST_BACKEND is {_backend!r}, which cannot run here: {BACKENDS[_backend].missing}")
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

    Raises:
        RuntimeError: "triton" was asked for, with a tensor on a processor, and its interpreter is off.
    """
    if _backend == "reference" or torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    device, dtype = x.device.type, x.dtype
    if _backend == "triton" and "triton" in names and device == "cpu":
        if not INTERPRETED:
            raise RuntimeError(
                "backend 'triton' was asked for, and the tensors are on the processor: move them to a GPU, or set "
                "TRITON_INTERPRET=1 before Python starts to interpret the kernels, slowly"
            )
        return "triton" if dtype in (torch.float32, torch.float64) else "reference"
    for name in names if _backend == "auto" else {_backend}.intersection(names):
        backend = BACKENDS[name]
        if device == backend.device and dtype in backend.dtypes:
            why, remedy = backend.missing, backend.remedy
            # torch.compile cannot trace the question, and learns it from the compiler.
            if not why and backend.device == "cuda" and not torch.compiler.is_compiling():
                why, remedy = _misfit(name, x.device)
            if not why:
                return name
            _warn_once(name, why, remedy)
    return "reference"


@cache
def _misfit(name: str, device: torch.device) -> tuple[str, str]:
    """Why a backend that is there cannot run on this GPU, or "", and what helps."""
    least = BACKENDS[name].capability
    if torch.cuda.get_device_capability(device) < least:
        return f"this GPU's compute capability is below {least[0]}.{least[1]}", "use a newer one"
    if name == "cuda" and _cupy:
        return importlib.import_module("glf_fast.ops.cupy_linear").trouble(device), BACKENDS[name].remedy
    return "", ""


def _warn_once(name: str, why: str, remedy: str) -> None:
    if name not in _warned and not torch.compiler.is_compiling():
        _warned.add(name)
        warnings.warn(
            f"glf_fast runs its slow reference, because backend {name!r} is missing ({why}). To make it fast, {remedy}",
            RuntimeWarning,
            stacklevel=_users_level(),
        )


def _users_level() -> int:
    """How far up, for a warning, the first line is that is neither ours nor torch's, which calls our modules."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("glf_fast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
