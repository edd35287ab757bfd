"""The CUDA kernels of linear layers without nvcc: NVRTC compiles csrc/cuda at first use, through CuPy.

The same device code, launched as csrc/cuda/linear.cu does it, on torch's current stream; nothing synchronises. A kernel is
compiled when it is first needed (some seconds; CuPy keeps it on disk), so a graph is captured after a call outside of it.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["KERNELS", "NVRTC_OPTIONS", "SOURCE", "register"]

# The device code lies beside the package's sources, or in its folder when installed.
FOLDERS = (Path(__file__).parents[2] / "cuda", Path(__file__).parents[3] / "csrc" / "cuda")
SOURCE = '#include "kernels.cuh"\n'
NVRTC_OPTIONS = ("-std=c++17", *(f"-I{folder}" for folder in FOLDERS))

# kernels.cuh has these sizes, too.
WARP_THREADS, BLOCK_THREADS = 128, 256
SLICE_COLUMNS, STRIP_ROWS, TILE_COLUMNS, SUM_ROWS = 32, 16, 32, 4
INNER_CHUNK = {torch.float32: 64, torch.float64: 32}
TYPES = {torch.float32: "float", torch.float64: "double"}
# Columns a lane can hold, and entries along each side of a thread's tile, by what fits in registers.
WARP_SIZES = {torch.float32: (4, 8, 16, 24, 32, 48, 64), torch.float64: (4, 8, 16, 24, 32)}
TILE_SIZES = {torch.float32: (6, 8, 12), torch.float64: (4, 6, 8)}
KERNELS = tuple(
    f"glf::device::{name}>"
    for dtype, T in TYPES.items()
    for name in (
        *(
            f"{kernel}_kernel<{T}"
            for kernel in (
                "slogdet_inverse",
                "plu_assemble",
                "plu_assemble_backward",
                "plu_inverse_gradient",
            )
        ),
        *(f"slogdet_inverse_warp_kernel<{N}, {T}" for N in WARP_SIZES[dtype]),
        *(f"slogdet_inverse_tile_kernel<{M}, {T}" for M in TILE_SIZES[dtype]),
    )
)

LAYER = np.dtype(
    [("D", np.int32)]
    + [(name, np.uint64) for name in ("permutation", "lower", "upper", "log_diag", "sign", "log_scale", "bias")],
    align=True,
)
GRADIENTS = np.dtype([(name, np.uint64) for name in ("lower", "upper", "log_diag", "log_scale", "bias")])


class _Stream:
    """torch's current stream on a GPU, as CuPy takes those of others."""

    def __init__(self, device: torch.device) -> None:
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def _kernel(name: str, source: str, device: int) -> Any:
    import cupy

    return cupy.RawModule(code=source, options=NVRTC_OPTIONS, name_expressions=(name,)).get_function(name)


@cache
def trouble(device: torch.device) -> str:
    """Why CuPy cannot compile the kernels for this GPU, or "": compiles one that every flow needs."""
    try:
        import cupy

        with cupy.cuda.Device(device.index):
            _kernel("glf::device::plu_assemble_kernel<float>", SOURCE, device.index)
    except Exception as error:  # CuPy, its compiler, the driver: each has its own errors
        return f"CuPy does not compile it: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


@cache
def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index))


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    name: str,
    device: torch.device,
    grid: int,
    block: int,
    shared: int,
    arguments: tuple[Any, ...],
    source: str = SOURCE,
) -> None:
    """Put one kernel on the current stream of a GPU; `source` holds it."""
    import cupy

    with cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(device)):
        kernel = _kernel(name, source, device.index)
        if shared > 48 << 10:
            kernel.max_dynamic_shared_size_bytes = most_shared(device)  # whatever other threads ask for meanwhile
        kernel((grid,), (block,), arguments, shared_mem=shared)


def _run(name: str, like: Tensor, grid: int, block: int, shared: int, *arguments: Any) -> None:
    """Launch `name`<…, type of `like`>. Tensors and None become pointers; numbers have the kernel's types already."""
    if not grid:
        return
    numbers = tuple(pointer(a, like) if a is None or isinstance(a, Tensor) else a for a in arguments)
    launch(f"glf::device::{name}{TYPES[like.dtype]}>", like.device, grid, block, shared, numbers)


def pointer(tensor: Tensor | None, like: Tensor) -> int:
    """The address of a tensor's data as kernels on the device of `like` take it, 0 for None."""
    if tensor is None:
        return 0
    if tensor.device != like.device:
        raise RuntimeError(f"glf_fast: a kernel on {like.device} got a tensor on {tensor.device}")
    if not tensor.is_contiguous() or tensor.dtype not in (like.dtype, torch.int32, torch.int64):
        raise RuntimeError("glf_fast: a kernel got a tensor that is not contiguous, or tensors of several dtypes")
    return tensor.data_ptr()


def _dim(A: Tensor) -> int:
    if A.ndim != 3 or A.shape[1] != A.shape[2] or A.shape[1] > 32768 or A.shape[0] >= 1 << 31:
        raise RuntimeError(
            f"glf_fast: fewer than 2³¹ matrices (N, D, D) of up to 32768 rows are needed; got {(*A.shape,)}"
        )
    return A.shape[1]


def _room(A: Tensor) -> tuple[np.bool_, int]:
    """Whether a matrix fits a block's shared memory, and how much of it the block then needs."""
    dim, size = _dim(A), A.element_size()
    workspace = dim * size + (2 * dim + 2) * 4
    whole = dim * (dim | 1) * size + workspace
    room = whole <= most_shared(A.device)
    return np.bool_(room), whole if room else workspace


def _warps(A: Tensor) -> tuple[int, int, int]:
    """Columns that a lane holds, lanes that share a matrix, and blocks, where warps take the matrices."""
    N = next(N for N in WARP_SIZES[A.dtype] if A.shape[-1] <= N)
    lanes = next(lanes for lanes in (4, 8, 16, 32) if min(N, 32) <= lanes)
    return N, lanes, -(-len(A) // (WARP_THREADS // lanes))


def slogdet_inverse(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`glf_fast::slogdet_inverse`."""
    count, dim = len(A), _dim(A)
    sign, logabsdet, inverse = A.new_empty(count), A.new_empty(count), torch.empty_like(A)
    info = A.new_empty(count, dtype=torch.int32)
    out = (sign, logabsdet, inverse, info)
    tile = TILE_SIZES[A.dtype]
    if dim <= WARP_SIZES[A.dtype][-1]:
        N, _, blocks = _warps(A)
        _run(f"slogdet_inverse_warp_kernel<{N}, ", A, blocks, WARP_THREADS, 0, np.int64(count), np.int32(dim), A, *out)
    elif dim <= 16 * tile[-1]:
        M = next(M for M in tile if dim <= 16 * M)
        shared = 16 * M * (3 * A.element_size() + 2 * 4)
        _run(f"slogdet_inverse_tile_kernel<{M}, ", A, count, BLOCK_THREADS, shared, np.int32(dim), A, *out)
    else:
        room, shared = _room(A)
        _run("slogdet_inverse_kernel<", A, count, BLOCK_THREADS, shared, np.int32(dim), room, A, *out)
    return out


def plu_assemble_bytes(dim: int, size: int) -> int:
    """Shared memory of a block of `plu_assemble_kernel`, for numbers of `size` bytes."""
    return (STRIP_ROWS * (STRIP_ROWS + 2 * SLICE_COLUMNS) + 2 * dim) * size + 4 * dim


def _product_bytes(dtype: torch.dtype) -> int:
    return INNER_CHUNK[dtype] * (STRIP_ROWS + TILE_COLUMNS + 3) * dtype.itemsize


def plu_backward_bytes(dim: int, dtype: torch.dtype) -> int:
    """Shared memory of a block of `plu_assemble_backward_kernel`."""
    return _product_bytes(dtype) + TILE_COLUMNS * dtype.itemsize + dim * (dtype.itemsize + 4)


def plu_assemble(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, need_inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`glf_fast::plu_assemble`."""
    A, c, logabsdet = torch.empty_like(lower), torch.empty_like(log_diag), lower.new_empty(len(lower))
    A_inv = torch.empty_like(lower) if need_inverse else lower.new_empty(0)
    layer = _layer(permutation, lower, upper, log_diag, sign, log_scale, bias)
    dim = _dim(lower)
    shared = plu_assemble_bytes(dim, lower.element_size())
    blocks = len(lower) * -(-dim // SLICE_COLUMNS)
    out = (A, A_inv if need_inverse else None, c, logabsdet)
    _run("plu_assemble_kernel<", lower, blocks, BLOCK_THREADS, shared, layer, *out)
    return A, A_inv, c, logabsdet


def plu_assemble_backward(
    permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign: Tensor, log_scale: Tensor | None,
    bias: Tensor | None, A: Tensor, A_inv: Tensor | None, grad_A: Tensor | None, grad_A_inv: Tensor | None,
    grad_c: Tensor | None, grad_logabsdet: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """`glf_fast::plu_assemble_backward`."""
    if grad_A_inv is not None and A_inv is None:
        raise RuntimeError("glf_fast: the gradient of A⁻¹ needs A⁻¹")
    grads = [torch.empty_like(t) for t in (lower, upper, log_diag, log_scale, bias) if t is not None]
    dim, count = _dim(lower), len(lower)
    strips = -(-dim // STRIP_ROWS)
    if grad_A_inv is not None:  # grads[0] is room for it until it gets its values
        given = (np.int32(dim), A_inv, grad_A, grad_A_inv, grads[0], grad_A := torch.empty_like(lower))
        lines = _product_bytes(lower.dtype)
        _run("plu_inverse_gradient_kernel<", lower, count * strips, BLOCK_THREADS, lines, *given)
    jobs = 2 * strips * -(-dim // TILE_COLUMNS) + (0 if log_scale is None else -(-dim // SUM_ROWS))
    layer = _layer(permutation, lower, upper, log_diag, sign, log_scale, bias)
    pointers = [t.data_ptr() for t in grads] + [0] * (5 - len(grads))
    _run(
        "plu_assemble_backward_kernel<", lower, count * jobs, BLOCK_THREADS, plu_backward_bytes(dim, lower.dtype),
        layer, A, grad_A, grad_c, grad_logabsdet, np.array([tuple(pointers)], GRADIENTS),
    )  # fmt: skip
    return grads


def _layer(permutation: Tensor, lower: Tensor, *others: Tensor | None) -> np.ndarray:
    """Layer<T> of the first layer, as kernels take it: by value."""
    if permutation.dtype != torch.int64:
        raise RuntimeError(f"glf_fast: permutation must be int64; got {permutation.dtype}")
    return np.array([(_dim(lower), *(pointer(t, lower) for t in (permutation, lower, *others)))], LAYER)


def register(library: torch.library.Library, *, override: bool = False) -> None:
    """Make these the operations' implementations on GPUs while `library` lives; `override`: in the place of others."""
    with warnings.catch_warnings():
        if override:  # torch says so once a process
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel", UserWarning)
        for operation in (slogdet_inverse, plu_assemble, plu_assemble_backward):
            library.impl(operation.__name__, operation, "CUDA", allow_override=override)
