"""Sums over the rows of a workspace: the gradients of all biases, offsets and log|det A| of some steps, in one launch.

Plain PyTorch needs a reduction for each of three tensors, a copy of each layer's columns, a sum and an expansion: 9 launches
of some 2 µs in a graph, where the rest of glf-mnist's training pass takes some 60.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.launch import launch

__all__ = ["ColumnSums", "column_sums", "sums_kernel"]

ROWS, COLUMNS = 128, 32  # of a tile: 32 numbers a thread in flight
PART = 512  # rows that one program sums at least


@triton.jit
def sum_columns(
    rows_of, total, first, last, column, accumulate, ROW_STRIDE: tl.constexpr, N: tl.constexpr, BM: tl.constexpr
):
    """Σ of rows first … last − 1 of some columns, to or onto `total`."""
    state: tl.constexpr = total.dtype.element_ty
    exists = column < N
    sums = tl.zeros((BM, column.shape[0]), state)
    for start in range(first, last, BM):
        row = start + tl.arange(0, BM)
        at = rows_of + row.to(tl.int64)[:, None] * ROW_STRIDE + column[None, :]
        sums += tl.load(at, mask=(row < last)[:, None] & exists[None, :], other=0.0).to(state)
    found = tl.sum(sums, 0)
    if accumulate:
        found += tl.load(total + column, mask=exists, other=0.0)
    tl.store(total + column, found, mask=exists)


@triton.jit(do_not_specialize=["rows", "part_rows", "parts", "first_step", "all_steps", "accumulate"])
def sums_kernel(
    slopes, map_grad, grad_logdet, totals, rows, part_rows, parts, first_step, all_steps, accumulate,
    WIDTHS: tl.constexpr, STARTS: tl.constexpr, STRIDES: tl.constexpr, BLOCKS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of one of `totals`, (parts, all_steps, WIDTHS[i]), of one step and one part of the rows.

    Columns of the total i begin at STARTS[i] of rows of STRIDES[i] numbers: of slopes (steps, rows, …) for the biases, then of
    map_grad (steps, rows, D), then grad_logdet (rows,), which is every step's. BLOCKS: where each total's blocks begin.
    """
    LAST: tl.constexpr = len(WIDTHS) - 1
    one = tl.full([], 1, tl.int64)
    block = tl.program_id(0) % BLOCKS[LAST + 1]
    part = tl.program_id(0) // BLOCKS[LAST + 1] % parts
    k = tl.program_id(0) // BLOCKS[LAST + 1] // parts * one
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    for i in tl.static_range(LAST + 1):
        if block >= BLOCKS[i] and block < BLOCKS[i + 1]:
            column = (block - BLOCKS[i]) * BN + tl.arange(0, BN)
            total = totals[i] + (part * all_steps + first_step + k) * WIDTHS[i]
            if i == LAST:
                sum_columns(grad_logdet, total, first, last, column, accumulate, STRIDES[i], WIDTHS[i], BM)
            elif i == LAST - 1:
                rows_of = map_grad + k * rows * STRIDES[i]
                sum_columns(rows_of, total, first, last, column, accumulate, STRIDES[i], WIDTHS[i], BM)
            else:
                rows_of = slopes + k * rows * STRIDES[i] + STARTS[i]
                sum_columns(rows_of, total, first, last, column, accumulate, STRIDES[i], WIDTHS[i], BM)


class ColumnSums:
    """The sums of all steps of a flow, which `add` makes portion by portion; see `column_sums`."""

    def __init__(self, parts: int, totals: tuple[Tensor, ...], constants: dict[str, Any]) -> None:
        self.parts, self._totals, self._constants = parts, totals, constants

    def add(self, slopes: Tensor, map_grad: Tensor, grad_logdet: Tensor, start: int, accumulate: bool) -> None:
        """Of a portion's workspace: steps `start` and following, to these steps' sums, or onto them."""
        steps, rows, _ = map_grad.shape
        launch(
            sums_kernel, steps * self.parts * self._constants["BLOCKS"][-1], map_grad,
            slopes, map_grad, grad_logdet, self._totals, rows, triton.cdiv(rows, self.parts), self.parts, start,
            self._totals[0].shape[1], int(accumulate),
            **self._constants, BM=ROWS, BN=COLUMNS, num_warps=4,
        )  # fmt: skip

    def totals(self) -> list[Tensor]:
        """Those of the biases (K, nᵢ), of the offset (K, D), and (K,) of log|det A|."""
        whole = [t[0] if self.parts == 1 else t.sum(0) for t in self._totals]
        return [*whole[:-1], whole[-1][:, 0]]


def column_sums(steps: int, rows: int, sizes: dict[str, Any], density: bool, like: Tensor) -> ColumnSums:
    """Sums for a flow of so many steps and these `sizes`, over portions of at most `rows` rows, in the dtype of `like`.

    Thousands of rows go in parts, which are added up at the end: 8,192 rows would be 64 serial tiles of a program.
    """
    constants = _constants(sizes, density)
    parts = max(1, min(16, rows // PART)) if rows > 2 * PART else 1
    totals = tuple(like.new_empty(parts, steps, n) for n in constants["WIDTHS"])
    return ColumnSums(parts, totals, constants)


def _constants(sizes: dict[str, Any], density: bool) -> dict[str, Any]:
    dim, columns = sizes["D"], sizes["COLUMNS"]
    widths = (*sizes["HIDDEN"], sizes["N_RAW"], dim, 1)
    blocks = [triton.cdiv(n, COLUMNS) for n in widths[:-1]] + [int(density)]
    return {
        "WIDTHS": widths,
        "STARTS": (*columns, 0, 0),
        "STRIDES": (*(sizes["ROW_STRIDE"] for _ in columns), dim, 1),
        "BLOCKS": (0, *accumulate(blocks)),
    }
