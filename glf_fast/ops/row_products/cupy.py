"""`glf_fast::row_products` through CuPy, launched as csrc/cuda/row_products.cu does it."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from glf_fast.ops.linear.cupy import launch

__all__ = ["KERNELS", "SOURCE", "register"]

SOURCE = '#include "row_products.cuh"\n'
KERNELS = ("glf::device::row_products_kernel", "glf::device::add_parts_kernel")

# row_product.cuh has these sizes and structs, too.
MOST, SIDE, STAGE_ROWS, THREADS, SHARED, ADDED = 8, 64, 32, 256, 73_728, 1024
OF_ROWS, BF16 = (torch.float32, torch.float32, torch.bfloat16), 2
PRODUCT = np.dtype(
    [(name, np.uint64) for name in ("x", "g", "product", "sum")]
    + [(name, np.int64) for name in ("x_step", "g_step")]
    + [(name, np.int32) for name in ("x_row", "g_row", "n_in", "n_out", "operands", "x_bytes", "g_bytes")],
    align=True,
)
PRODUCTS = np.dtype(
    [(name, np.int32) for name in ("count", "steps", "rows", "parts", "part_rows", "accumulate")]
    + [("first_block", np.int32, MOST + 1), ("partial", np.uint64), ("of", PRODUCT, MOST)],
    align=True,
)


def row_products(
    x: list[Tensor], g: list[Tensor], operands: list[int], products: list[Tensor], sums: list[Tensor], accumulate: bool,
    parts: int,
) -> None:  # fmt: skip
    """`glf_fast::row_products`."""
    lists = (x, g, operands, products, sums)
    if not 1 <= len(g) <= MOST or any(len(one) != len(g) for one in lists):
        raise RuntimeError(f"glf_fast: row_products takes lists of 1 to {MOST} and of one length")
    if parts < 1:
        raise RuntimeError("glf_fast: row_products takes one part or more")
    if g[0].ndim != 3:
        raise RuntimeError("glf_fast: row_products takes factors (steps, rows, columns)")
    steps, rows = g[0].shape[:2]
    layers, first_block = np.zeros(MOST, PRODUCT), np.zeros(MOST + 1, np.int32)
    numbers = 0  # of a step
    for i, (a, b, how, product, total) in enumerate(zip(*lists, strict=True)):
        if not 0 <= how <= BF16:
            raise RuntimeError("glf_fast: operands of row_products are 0, 1 or 2")
        n_in, n_out = a.shape[-1], b.shape[-1]
        summed = total.ndim == 2
        (of_a, a_step, a_row, a_bytes), (of_b, b_step, b_row, b_bytes) = (
            _rows(t, g[0], OF_ROWS[how], steps, rows) for t in (a, b)
        )
        results = (_result(product, g[0], (steps, n_in, n_out)), _result(total, g[0], (steps, n_out)) if summed else 0)
        layers[i] = (of_a, of_b, *results, a_step, b_step, a_row, b_row, n_in, n_out, how, a_bytes, b_bytes)
        first_block[i + 1 :] += max(1, -(-n_in // SIDE)) * -(-n_out // SIDE)
        numbers += (n_in + summed) * n_out
    wanted = -(-rows // parts)
    part_rows = -(-wanted // STAGE_ROWS) * STAGE_ROWS
    parts = -(-rows // part_rows) if part_rows else 1
    blocks = steps * parts * int(first_block[-1])
    if not blocks:
        return
    partial = g[0].new_empty(parts * steps * numbers if parts > 1 else 0, dtype=torch.float32)
    given = (
        len(g),
        steps,
        rows,
        parts,
        part_rows,
        accumulate,
        first_block,
        partial.data_ptr() if parts > 1 else 0,
        layers,
    )
    arguments = (np.array([given], PRODUCTS),)
    device = g[0].device
    launch(KERNELS[0], device, blocks, THREADS, SHARED, arguments, SOURCE)
    if parts > 1:
        launch(KERNELS[1], device, steps * -(-numbers // ADDED), THREADS, 0, arguments, SOURCE)


def _rows(t: Tensor, like: Tensor, dtype: torch.dtype, steps: int, rows: int) -> tuple[int, int, int, int]:
    """Pointer, numbers from step to step and from row to row, and the bytes that can be copied at once."""
    if t.device != like.device or t.dtype != dtype:
        raise RuntimeError(f"glf_fast: row_products got rows of {t.dtype} on {t.device} for {dtype} on {like.device}")
    if t.ndim != 3 or t.shape[:2] != (steps, rows):
        raise RuntimeError("glf_fast: row_products takes factors (steps, rows, columns)")
    if not t.numel():
        return 0, 0, 0, 16
    if t.shape[2] > 1 and t.stride(2) != 1:
        raise RuntimeError("glf_fast: row_products takes rows whose numbers are neighbours")
    step, row = t.stride(0) * (steps > 1), t.stride(1) * (rows > 1)
    places = t.data_ptr() | step * t.element_size() | row * t.element_size()
    size = next(size for size in (16, 8, 4, 2) if places % size == 0)
    if size < 4:
        raise RuntimeError("glf_fast: row_products takes bf16 rows that begin at multiples of four bytes")
    return t.data_ptr(), step, row, size


def _result(t: Tensor, like: Tensor, shape: tuple[int, ...]) -> int:
    if t.shape != shape or t.dtype != torch.float32 or not t.is_contiguous() or t.device != like.device:
        raise RuntimeError(
            "glf_fast: results of row_products are contiguous float32, (steps, n_in, n_out) and (steps, n_out)"
        )
    return t.data_ptr()


def register(library: torch.library.Library, *, override: bool = False) -> None:
    """Make this the operation's implementation on GPUs while `library` lives; `override`: in the place of another."""
    with warnings.catch_warnings():
        if override:  # torch says so once a process
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel", UserWarning)
        library.impl("row_products", row_products, "CUDA", allow_override=override)
