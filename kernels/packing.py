"""The parameters of a flow as its kernels read them: padded, rounded once, step after step. One launch for all K steps.

A step's matrices and vectors lie behind one another, so that a kernel needs three pointers whatever the depth of its MLP:

    maps     (K, 2·HALF, 2·HALF)   A, or A⁻¹: rows and columns of p, zeros up to HALF, those of v, zeros up to 2·HALF
    weights  (K, WEIGHTS[-1])      W₀ [HALF + ⌈C⌉, ⌈n₁⌉], W₁ [⌈n₁⌉, ⌈n₂⌉], …, W_out [⌈n⌉, 2·HALF], the last as [u | t]
    vectors  (K, VECTORS[-1])      c [2·HALF], b₁ [⌈n₁⌉], …, b_out [2·HALF], log|det A| in front of 15 zeros

W_out and b_out of splines have ⌈T⌉·(2·B + S) columns: all widths, then all heights, then all slopes. Those of each column of v
are padded to powers of two, B for widths and heights and S for slopes (`padded_bins`). For the backward, a second W_out
[⌈n⌉, ⌈N_RAW⌉] follows in the network's own order.

⌈n⌉ is n rounded up to a multiple of 16, what a matrix unit multiplies at once: tiles are read without masks, 16 bytes at
a time. Operands of tf32 products are rounded and those of bf16 products converted here: every program, chunk and thread of
the flow's kernels did that before, 195 of the 422 instructions of the hot loop at D 64, H 256. 512 programs of 128 rows
converted the same 3 MB, and read them as float32 where bf16 is half.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from glf_fast.kernels.flow_options import FlowOptions, operand_dtype
from glf_fast.kernels.launch import launch
from glf_fast.kernels.spline import BINS, TAILS, padded_bins
from glf_fast.kernels.tiles import COMPILED, round_tf32

__all__ = ["Packed", "pack", "pack_kernel"]

# Numbers of a program: 8 a thread. The interpreter's programs take their time by their number.
BLOCK = 1024 if COMPILED else 16384


class Packed(NamedTuple):
    """See above; `unmaps` are those of a second stack of matrices, or `maps` again."""

    maps: Tensor
    unmaps: Tensor
    weights: Tensor
    vectors: Tensor


@triton.jit
def pack_matrix(
    source, target, block, I0: tl.constexpr, I0_PADDED: tl.constexpr, I1: tl.constexpr, I1_PADDED: tl.constexpr,
    J0: tl.constexpr, J0_PADDED: tl.constexpr, J1: tl.constexpr, J1_PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of a matrix (I0 + I1, J0 + J1) whose two groups of rows, and of columns, are padded each with zeros."""
    ROWS: tl.constexpr = I0_PADDED + I1_PADDED
    COLUMNS: tl.constexpr = J0_PADDED + J1_PADDED
    at = block * BLOCK + tl.arange(0, BLOCK)
    i = at // COLUMNS
    j = at % COLUMNS
    exists = (at < ROWS * COLUMNS) & tl.where(i < I0_PADDED, i < I0, i - I0_PADDED < I1)
    exists &= tl.where(j < J0_PADDED, j < J0, j - J0_PADDED < J1)
    from_i = tl.where(i < I0_PADDED, i, i - I0_PADDED + I0)
    from_j = tl.where(j < J0_PADDED, j, j - J0_PADDED + J0)
    w = tl.load(source + from_i * (J0 + J1) + from_j, mask=exists, other=0.0)
    if COMPILED and PRECISION == "tf32":
        w = round_tf32(w)
    tl.store(target + at, w.to(target.dtype.element_ty), mask=at < ROWS * COLUMNS)


@triton.jit
def pack_layer(
    i: tl.constexpr, weight, target, k, block, D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, N_RAW: tl.constexpr, SPLINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK numbers of layer i's weight of step k: the first layer's rows are p's and the context's, the last one's columns
    those of u and of t, or of splines. The layer behind the last one is W_out of splines in the network's own order."""
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    OUT: tl.constexpr = len(HIDDEN)
    BEFORE: tl.constexpr = OUT - 1 if i > OUT else i - 1
    I0: tl.constexpr = P if i == 0 else HIDDEN[BEFORE]
    I0_PADDED: tl.constexpr = HALF if i == 0 else COLUMNS[BEFORE + 1] - COLUMNS[BEFORE]
    if i == OUT and len(SPLINE) > 0:
        pack_splines(weight + k * (I0 * N_RAW), target, block, T, I0, I0_PADDED, SPLINE, PRECISION, BLOCK)
    else:
        I1: tl.constexpr = C if i == 0 else 0
        I1_PADDED: tl.constexpr = (C + 15) // 16 * 16 if i == 0 else 0
        HALVES: tl.constexpr = i == OUT
        J: tl.constexpr = N_RAW if i > OUT else T if HALVES else HIDDEN[i]
        J_PADDED: tl.constexpr = (N_RAW + 15) // 16 * 16 if i > OUT else HALF if HALVES else COLUMNS[i + 1] - COLUMNS[i]
        J1: tl.constexpr = T if HALVES else 0
        J1_PADDED: tl.constexpr = HALF if HALVES else 0
        pack_matrix(
            weight + k * ((I0 + I1) * (J + J1)), target, block, I0, I0_PADDED, I1, I1_PADDED, J, J_PADDED, J1, J1_PADDED,
            PRECISION, BLOCK,
        )  # fmt: skip


@triton.jit
def pack_splines(
    source, target, block, T: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, SPLINE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK packed numbers of a matrix (ROWS, N_RAW) whose columns are the numbers of T splines, one spline after the other."""
    K: tl.constexpr = SPLINE[BINS]
    SLOPES: tl.constexpr = K + SPLINE[TAILS]
    B: tl.constexpr = padded_bins(K)
    S: tl.constexpr = padded_bins(SLOPES)
    FEATURES: tl.constexpr = (T + 15) // 16 * 16
    COLUMNS: tl.constexpr = FEATURES * (2 * B + S)
    at = block * BLOCK + tl.arange(0, BLOCK)
    i = at // COLUMNS
    j = at % COLUMNS
    height = j >= FEATURES * B
    slope = j >= 2 * FEATURES * B
    place = tl.where(slope, j - 2 * FEATURES * B, tl.where(height, j - FEATURES * B, j))
    feature = tl.where(slope, place // S, place // B)
    number = tl.where(slope, place % S, place % B)
    exists = (i < ROWS) & (feature < T) & tl.where(slope, number < SLOPES, number < K)
    from_j = feature * (2 * K + SLOPES) + tl.where(slope, 2 * K, tl.where(height, K, 0)) + number
    w = tl.load(source + i * (T * (2 * K + SLOPES)) + from_j, mask=exists, other=0.0)
    if COMPILED and PRECISION == "tf32":
        w = round_tf32(w)
    tl.store(target + at, w.to(target.dtype.element_ty), mask=at < PADDED * COLUMNS)


@triton.jit
def pack_vector(source, target, J0: tl.constexpr, J0_PADDED: tl.constexpr, J1: tl.constexpr, J1_PADDED: tl.constexpr):
    """A vector (J0 + J1) whose two groups are padded each with zeros."""
    LONG: tl.constexpr = triton.next_power_of_2(J0_PADDED + J1_PADDED)
    j = tl.arange(0, LONG)
    exists = tl.where(j < J0_PADDED, j < J0, j - J0_PADDED < J1)
    b = tl.load(source + tl.where(j < J0_PADDED, j, j - J0_PADDED + J0), mask=exists, other=0.0)
    tl.store(target + j, b, mask=j < J0_PADDED + J1_PADDED)


@triton.jit(do_not_specialize=["steps", "n_logs"])
def pack_kernel(
    matrix, unmatrix, offset, weights, biases, logabsdet, maps, packed_weights, vectors, steps, n_logs,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_STRIDE: tl.constexpr, WEIGHTS: tl.constexpr, VECTORS: tl.constexpr, N_RAW: tl.constexpr, SPLINE: tl.constexpr,
    BLOCKS: tl.constexpr, MAPS: tl.constexpr, MAP: tl.constexpr, MLP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of one matrix of one step, or all vectors of a step.

    MAPS stacks of matrices, 1 or 2. BLOCKS: where, among a step's blocks, those of each map, of each weight and the vectors'
    begin, and how many there are. `n_logs` numbers log|det A|, one for each step or a single one, which the first takes.
    """
    P: tl.constexpr = D - D // 2
    T: tl.constexpr = D // 2
    LAYERS: tl.constexpr = len(HIDDEN) + 1
    MATRICES: tl.constexpr = len(WEIGHTS) - 1  # one more than layers where the last one comes twice
    one = tl.full([], 1, tl.int64)
    k = tl.program_id(0) // BLOCKS[MAPS + MATRICES + 1] * one
    block = tl.program_id(0) % BLOCKS[MAPS + MATRICES + 1]

    for m in tl.static_range(MAPS):
        if block >= BLOCKS[m] and block < BLOCKS[m + 1]:
            source = matrix if m == 0 else unmatrix
            pack_matrix(
                source + k * (D * D), maps + (k + m * one * steps) * (4 * HALF * HALF), block - BLOCKS[m],
                P, HALF, T, HALF, P, HALF, T, HALF, MAP, BLOCK,
            )  # fmt: skip
    for i in tl.static_range(MATRICES):
        if block >= BLOCKS[MAPS + i] and block < BLOCKS[MAPS + i + 1]:
            to = packed_weights + k * WEIGHTS[MATRICES] + WEIGHTS[i]
            weight = weights[i if i < LAYERS else LAYERS - 1]
            pack_layer(
                i, weight, to, k, block - BLOCKS[MAPS + i], D, HALF, C, HIDDEN, COLUMNS, N_RAW, SPLINE, MLP, BLOCK
            )
    if block == BLOCKS[MAPS + MATRICES]:
        to = vectors + k * VECTORS[LAYERS + 2]
        pack_vector(offset + k * D, to, P, HALF, T, HALF)
        for i in tl.static_range(LAYERS - 1):
            b = biases[i] + k * HIDDEN[i]
            pack_vector(b, to + VECTORS[i + 1], HIDDEN[i], COLUMNS[i + 1] - COLUMNS[i], 0, 0)
        b_out = biases[LAYERS - 1] + k * N_RAW
        if len(SPLINE) > 0:
            for part in range((VECTORS[LAYERS + 1] - VECTORS[LAYERS] + BLOCK - 1) // BLOCK):
                pack_splines(b_out, to + VECTORS[LAYERS], part, T, 1, 1, SPLINE, "ieee", BLOCK)
        else:
            pack_vector(b_out, to + VECTORS[LAYERS], T, HALF, T, HALF)
        log = tl.load(logabsdet + k, mask=k < n_logs, other=0.0)
        j = tl.arange(0, 16)
        tl.store(to + VECTORS[LAYERS + 1] + j, tl.where(j == 0, log, 0.0))


def _blocks(constants: dict[str, Any], maps: int) -> tuple[int, ...]:
    """BLOCKS of `pack_kernel`."""
    weights = constants["WEIGHTS"]
    sizes = [4 * constants["HALF"] ** 2] * maps + [b - a for a, b in pairwise(weights)]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + triton.cdiv(size, BLOCK))
    return *starts, starts[-1] + 1


def pack(
    matrix: Tensor,
    unmatrix: Tensor | None,
    offset: Tensor,
    logabsdet: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    constants: dict[str, Any],
    options: FlowOptions,
) -> Packed:
    """The parameters of a flow's K steps for its kernels. One launch.

    Contiguous tensors of one dtype on one device, as in `flow_forward`; `unmatrix` (K, D, D) is a second stack of matrices;
    `logabsdet` log|det A| of each step (K,), or their sum (). `constants` are those of `sizes`.
    """
    steps, maps = len(matrix), 1 if unmatrix is None else 2
    square = (steps, 4 * constants["HALF"] ** 2)
    packed = offset.new_empty(maps, *square)
    packed_weights = offset.new_empty((steps, constants["WEIGHTS"][-1]), dtype=operand_dtype(offset, options))
    vectors = offset.new_empty((steps, constants["VECTORS"][-1]))
    blocks = _blocks(constants, maps)
    launch(
        pack_kernel, steps * blocks[-1], offset,
        matrix, matrix if unmatrix is None else unmatrix, offset, tuple(weights), tuple(biases),
        offset if logabsdet is None else logabsdet, packed, packed_weights, vectors, steps,
        0 if logabsdet is None else logabsdet.numel(),
        **constants, BLOCKS=blocks, MAPS=maps, MAP=options.map_precision, MLP=options.mlp_precision, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return Packed(packed[0], packed[-1], packed_weights, vectors)
