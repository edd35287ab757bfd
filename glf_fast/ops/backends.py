"""The backends of this installation, how to get the others, and the choice of a backend for a call."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from glf_fast.ops.checks import check_choice

__all__ = [
    "BACKENDS",
    "CPP",
    "CUDA",
    "CUPY",
    "TRITON",
    "Backend",
    "Kernels",
    "backends",
    "check_environment",
    "chosen",
    "exporting_onnx",
    "kernels_for",
    "ordinary",
    "recorded",
    "transformed",
    "untraced",
    "usable",
    "use_backend",
]

BACKENDS: dict[str, Backend] = {}


@dataclass(frozen=True)
class Backend:
    """A way to run kernels: the tensors that it takes, whether it is there, and how to get it."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    missing: str  # why it cannot run, or "". Known at import: torch.compile must not meet the finding out.
    ready: Callable[[], str]  # one line on what it is, where it can
    remedy: str  # what a user whose tensors it would take should do where it is missing
    cost: str  # of doing without it, measured: bench/results has the files
    capability: tuple[int, int] = (0, 0)  # the least compute capability of a GPU that it runs on

    def __post_init__(self) -> None:
        BACKENDS[self.name] = self


class Kernels(Protocol):
    """An op's kernels in some backends: a module of the op's folder. The op documents what it calls besides."""

    @property
    def BACKENDS(self) -> tuple[Backend, ...]:
        """The backends that they are for."""

    def refuses(self, call: Any) -> str:
        """Why these kernels cannot take this call, whose tensors are of a backend's device and dtype; "" where they can."""


# -- choosing ----------------------------------------------------------------------------------------------------------

_default = os.environ.get("GLF_FAST_BACKEND") or "auto"
_blocks: list[list[str]] = []  # the names of the `use_backend` blocks that run now, in the order in which they began
# The last of them, or the default. Global, because torch.compile cannot trace a ContextVar and watches neither that nor a
# thread's own variables; and because backwards on a GPU run in threads of autograd, which have no context.
_choice = _default
_warned: set[str] = set()


def _choices() -> tuple[str, ...]:
    return ("auto", "reference", *BACKENDS)


def check_environment() -> None:
    """Raise ValueError or RuntimeError unless $GLF_FAST_BACKEND and $GLF_FAST_ISA name what exists and can run here.

    A command (`python -m glf_fast.…`), before whose own code the package is imported, ends with one line instead.
    """
    try:
        check_choice("$GLF_FAST_ISA", os.environ.get("GLF_FAST_ISA", ""), ("", "avx512", "avx2", "generic"))
        check_choice("$GLF_FAST_BACKEND", _choice, _choices())
        if _choice in BACKENDS and (why := BACKENDS[_choice].missing):
            raise RuntimeError(f"$GLF_FAST_BACKEND is {_choice!r}, which cannot run here: {why}")
    except (ValueError, RuntimeError) as error:
        if sys.argv[:1] != ["-m"] or not re.search(r"\0-m\0?glf_fast\.", "\0".join(sys.orig_argv)):
            raise
        print(f"error: {error}; set the variable to another value, or unset it", file=sys.stderr)
        sys.exit(2)


def backends() -> dict[str, str]:
    """Name → one line that says whether and where that backend runs. `"reference"` always does."""
    states = {name: backend.missing or f"ready: {backend.ready()}" for name, backend in BACKENDS.items()}
    return {"reference": "ready: plain PyTorch, any device and dtype", **states}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the `with` block on one backend: "auto" (the fastest there is), "reference" or one of
    `backends()`.

    The choice holds for all threads of the process. Where blocks in several threads overlap, the one that began last decides
    until it ends. $GLF_FAST_BACKEND sets the same for a whole process. What a backend cannot run falls back to the reference.

    Raises:
        ValueError: an unknown name. RuntimeError: that backend is not there; the message says why.
    """
    global _choice
    check_choice("backend", name, _choices())
    if name in BACKENDS and (why := BACKENDS[name].missing):
        raise RuntimeError(f"backend {name!r} cannot run here: {why}")
    block = [name]
    _blocks.append(block)
    _choice = name
    try:
        yield
    finally:
        del _blocks[next(i for i, other in enumerate(_blocks) if other is block)]
        _choice = _blocks[-1][0] if _blocks else _default


def chosen() -> str:
    """The name that `use_backend` or $GLF_FAST_BACKEND chooses now, or "auto"."""
    return _choice


def transformed() -> bool:
    """Whether a function transform or forward-mode differentiation is active, which plain PyTorch alone follows."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def exporting_onnx() -> bool:
    """Whether torch.onnx.export follows the call: ONNX has no kernels of ours, plain PyTorch it can translate."""
    # torch.jit.is_tracing() takes 0.1 µs longer, and every operation asks this several times.
    tracing = torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch._C._is_tracing())
    return tracing and torch.onnx.is_in_onnx_export()


def ordinary(*, transforms: bool = False) -> bool:
    """Whether tensors now have values that may be compared and cached: nothing traces, transforms or replaces them.

    With `transforms` a function transform may run, for tensors that it does not replace.
    """
    return not (
        torch.compiler.is_compiling()
        or (not transforms and transformed())
        or torch._C._len_torch_dispatch_stack()  # fake tensors
        or torch.jit.is_tracing()
    )


def recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is made of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def untraced(x: Tensor) -> bool:
    """Whether x is a tensor of torch's own class, which no compiler, and no mode of fake tensors, replaces now."""
    kind = type(x)
    own = kind is Tensor or kind is torch.nn.Parameter
    return own and not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


def kernels_for(x: Tensor, call: Any, *candidates: Kernels) -> Any:
    """The first of these kernels that takes this call on tensors like x here and now; None: the reference does.

    Raises:
        RuntimeError: "triton" was asked for, with a tensor on a processor, and its interpreter is off.
    """
    device = x.device.type
    for kernels in candidates:
        for backend in kernels.BACKENDS:
            # `usable` asks the first again; asked here it costs no function call for the kernels of another device.
            if (
                (device == backend.device or _choice == backend.name)
                and usable(backend, x)
                and not kernels.refuses(call)
            ):
                return kernels
    return None


def usable(backend: Backend, x: Tensor) -> bool:
    """Whether this backend runs for tensors like x here and now. Where it would and is missing, says so once."""
    if _choice not in ("auto", backend.name) or transformed() or exporting_onnx():
        return False
    device, dtype = x.device.type, x.dtype
    if device != backend.device:
        return _choice == "triton" and device == "cpu" and _interpreted(dtype)
    if dtype not in backend.dtypes:
        return False
    why, remedy = backend.missing, backend.remedy
    # torch.compile cannot trace the question, and learns it from the compiler.
    if not why and device == "cuda" and not torch.compiler.is_compiling():
        why, remedy = _misfit(backend, x.device)
    if why:
        _warn_once(backend.name, why, remedy)
    return not why


def _interpreted(dtype: torch.dtype) -> bool:
    if not INTERPRETED:
        raise RuntimeError(
            "backend 'triton' was asked for, and the tensors are on the processor: move them to a GPU, or set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels, slowly"
        )
    return dtype in (torch.float32, torch.float64)


@cache
def _misfit(backend: Backend, device: torch.device) -> tuple[str, str]:
    """Why a backend that is there cannot run on this GPU, or "", and what helps."""
    least = backend.capability
    if torch.cuda.get_device_capability(device) < least:
        return f"this GPU's compute capability is below {least[0]}.{least[1]}", "use a newer one"
    if backend is CUDA and CUPY:
        return importlib.import_module("glf_fast.ops.linear.cupy").trouble(device), backend.remedy
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


# -- what is there -----------------------------------------------------------------------------------------------------

# Triton reads it when kernels are defined; what it says now is what they will be.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
VECTORS = {64: "AVX-512", 32: "AVX2", 16: "the processor's basic vectors (128 bits)"}
AGAIN = "in glf_fast's folder: pip install -v --no-build-isolation --no-deps -e ."


def _load(pattern: str, why: str) -> str:
    """Load a compiled library of the package; returns "", or why it is missing: `why`, where none was built."""
    for library in sorted(Path(__file__).parent.parent.glob(pattern)):
        try:
            torch.ops.load_library(library)
            return ""
        except (OSError, RuntimeError) as error:
            why = f"{library.name} does not load: {error}"
    return why


def _load_cuda() -> tuple[str, bool]:
    """Load the compiled CUDA kernels; returns why they cannot run, or "", and whether CuPy compiles them instead."""
    if not torch.version.cuda:
        return "this torch is built without CUDA", False
    why = _load("_cuda*.so", "not built: the installation, whose log says why, found no nvcc that fits this torch")
    if not why:
        return "", False
    without = _cupy_missing(torch.version.cuda.partition(".")[0])
    return (f"{why}; {without}", False) if without else ("", True)


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


def _cpp_ready() -> str:
    return f"float32 and float64 on the processor, with {VECTORS[torch.ops.glf_fast.cpu_vector_bytes()]}"


def _cuda_ready() -> str:
    how = ", compiled at their first use by CuPy" if CUPY else ""
    return f"linear layers in float32 and float64, small flows and gradients of weights in float32, on NVIDIA GPUs{how}"


_cuda_missing, CUPY = _load_cuda()  # CUPY: the CUDA kernels are compiled by CuPy when they are needed

TRITON = Backend(
    "triton",
    device="cuda",
    dtypes=(torch.float32,),
    missing=_triton_missing(),
    ready=_triton_ready,
    remedy="install a torch with CUDA, which brings triton: https://pytorch.org/get-started",
    cost="the whole flow runs as some hundred small kernels instead of one; not yet measured on a GPU",
    capability=(8, 0),  # tf32 and bf16
)
CPP = Backend(
    "cpp",
    device="cpu",
    dtypes=(torch.float32, torch.float64),
    missing=_load(
        "_cpu*.so", "not built: the installation, whose log says why, found no C++ compiler that it could use"
    ),
    ready=_cpp_ready,
    remedy=f"install a C++ compiler (apt install g++), then {AGAIN}",
    cost=(
        "training a flow takes 2.9 (D 64, H 256) to 5.6 (D 20, H 64) times as long: batch 256, two Zen 5 cores, "
        "bench/results/epyc-zen5-2-cores/times.json"
    ),
)
CUDA = Backend(
    "cuda",
    device="cuda",
    dtypes=(torch.float32, torch.float64),
    missing=_cuda_missing,
    ready=_cuda_ready,
    remedy=(
        f"pip install 'cupy-cuda{(torch.version.cuda or '13').partition('.')[0]}x>=14', or, where nvcc of that CUDA is, "
        f"{AGAIN}"
    ),
    cost="linear layers run in torch.linalg, in many launches each; not yet measured on a GPU",
    capability=(7, 5),  # the first architecture of setup.py
)
