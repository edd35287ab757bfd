"""The CUDA kernels without nvcc: NVRTC compiles csrc/cuda at first use, through CuPy.

The same device code as in csrc/cuda's .cu files, on torch's current stream; nothing synchronises. A kernel is compiled when it is
first needed (some seconds; CuPy keeps it on disk), so a graph is captured after a call outside of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["NVRTC_OPTIONS", "implement", "launch", "most_shared", "trouble"]

# The device code lies beside the package's sources, or in its folder when installed.
FOLDERS = (Path(__file__).parents[1] / "cuda", Path(__file__).parents[2] / "csrc" / "cuda")
NVRTC_OPTIONS = ("-std=c++17", *(f"-I{folder}" for folder in FOLDERS))


class _Stream:
    """torch's current stream on a GPU, as CuPy takes those of others."""

    def __init__(self, device: torch.device) -> None:
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def _kernel(source: str, name: str, device: int) -> Any:
    import cupy

    return cupy.RawModule(code=source, options=NVRTC_OPTIONS, name_expressions=(name,)).get_function(name)


@cache
def trouble(device: torch.device) -> str:
    """Why CuPy cannot compile the kernels for this GPU, or "": compiles one that every flow needs."""
    try:
        import cupy

        with cupy.cuda.Device(device.index):
            _kernel('#include "kernels.cuh"\n', "glf::device::plu_assemble_kernel<float>", device.index)
    except Exception as error:  # CuPy, its compiler, the driver: each has its own errors
        return f"CuPy does not compile it: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


@cache
def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index))


def launch(
    source: str, name: str, device: torch.device, grid: int, block: int, shared: int, arguments: tuple[Any, ...]
) -> None:
    """Put one kernel of a source on the current stream of a GPU."""
    import cupy

    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(device)):
        kernel = _kernel(source, name, device.index)
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = most_shared(device)  # whatever other threads ask for meanwhile
        kernel((grid,), (block,), arguments, shared_mem=shared)


def implement(library: torch.library.Library, operations: Iterable[Callable[..., Any]], override: bool) -> None:
    """Make functions the implementations on GPUs of the operations of their names; `override`: in the place of others."""
    with warnings.catch_warnings():
        if override:  # torch says so once a process
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel", UserWarning)
        for operation in operations:
            library.impl(operation.__name__, operation, "CUDA", allow_override=override)
